#include "tests/kernels/rig.h"

#include <bit>
#include <cstdlib>
#include <numeric>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/cuda/attention.h"
#include "tests/sanitized.h"
#ifdef ROLLPACK_EMULATES_CUDA
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device_link.h"
#include "kernels/cuda/emulation/emulated_device.h"
#endif

namespace rollpack::kernels::testing {
namespace {

class OpsProgram final : public StepProgram {
 public:
  explicit OpsProgram(Ops ops) : ops_(std::move(ops)) {}
  void run(Backend& backend, int64_t, int64_t) override { ops_(backend); }

 private:
  Ops ops_;
};

#ifdef ROLLPACK_EMULATES_CUDA
std::shared_ptr<const cuda::NcclLibrary> open_fake_nccl() {
  return std::make_shared<const cuda::NcclLibrary>(FAKE_NCCL);
}
#endif

}  // namespace

std::vector<std::byte> make_fake_link() {
#ifdef ROLLPACK_EMULATES_CUDA
  return cuda::make_nccl_link(open_fake_nccl);
#else
  return {};
#endif
}

std::vector<std::string> tested_backends() {
  std::vector<std::string> names = backend_names();
  if (choose_backend("auto").name != "cuda") std::erase(names, "cuda");  // built, but no device
#ifdef ROLLPACK_EMULATES_CUDA
  names.emplace_back(kEmulatedCuda);
#endif
  return names;
}

std::unique_ptr<Backend> make_tested_backend(std::string_view name, const ModelShape& shape,
                                             const BackendOptions& options) {
#ifdef ROLLPACK_EMULATES_CUDA
  if (name == kEmulatedCuda) {
    // What stands in for NCCL exchanges when it is called, not when its turn comes on a stream.
    const bool defers = options.device_link.empty();
    return make_cuda_backend(cuda::make_emulated_device({.defers = defers}), shape, options,
                             open_fake_nccl);
  }
#endif
  return make_backend(name, shape, options);
}

int64_t max_head_width(std::string_view name) {
  return name == kEmulatedCuda || name == "cuda" ? cuda::kMaxHeadWidth : 258;
}

bool takes_all_cases(std::string_view backend) {
  // Plain loops have no edges that a sanitizer could find them beyond.
  const bool is_slow = kIsSanitized && backend == "reference";
  if (backend != kEmulatedCuda && !is_slow) return true;
  const char* const full = std::getenv("ROLLPACK_FULL");
  return full != nullptr && std::string_view(full) == "1";
}

std::vector<int32_t> numbers_of(std::string_view backend, int32_t first, int32_t last, size_t few) {
  std::vector<int32_t> all(static_cast<size_t>(last - first + 1));
  std::iota(all.begin(), all.end(), first);
  return cases_of(backend, std::move(all), few);
}

uint64_t Numbers::next() {
  uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

float Numbers::uniform(float scale) {
  return scale * (static_cast<float>(next() >> 40) * 0x1p-23f - 1.0f);
}

std::vector<float> Numbers::vector(int64_t count, float scale) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = uniform(scale);
  return values;
}

std::vector<int32_t> Numbers::ids(int64_t count, int64_t V) {
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int32_t& id : ids) id = below(static_cast<int32_t>(V));
  return ids;
}

std::vector<int32_t> Numbers::permutation(int32_t count) {
  std::vector<int32_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  for (int32_t i = count - 1; i > 0; --i) std::swap(order[i], order[below(i + 1)]);
  return order;
}

std::vector<float> rounded(std::vector<float> values, DType dtype) {
  if (dtype == DType::kBF16) {
    for (float& value : values) value = bf16_to_f32(f32_to_bf16(value));
  }
  return values;
}

ModelShape small_shape(DType dtype) {
  return {.D = 32, .H = 2, .G = 1, .K = 16, .F = 48, .V = 130, .L = 1, .dtype = dtype};
}

Rig::Rig(const std::string& name, const ModelShape& shape, RigOptions options) : shape_(shape) {
  BackendOptions given{.num_threads = options.num_threads,
                       .kv_cache_bytes = int64_t{1} << 20,
                       .max_num_seqs = options.max_num_seqs,
                       .max_num_batched_tokens = options.max_num_batched_tokens,
                       .enforce_eager = options.enforce_eager};
  // A page's size is the backend's own: ask a small one, then take as many pages as are wanted.
  const int64_t page_bytes = make_tested_backend(name, shape, given)->info().kv.page_bytes;
  given.kv_cache_bytes = page_bytes * options.num_pages;
  backend_ = options.make ? options.make(shape, given) : make_tested_backend(name, shape, given);
}

Rig::~Rig() {
  for (const Buffer& buffer : buffers_) backend_->free(buffer);
}

WeightId Rig::weight(WeightKind kind, std::vector<std::vector<float>> parts, int64_t cols) {
  std::string name = std::to_string(specs_.size());
  name.insert(name.begin(), 'w');
  WeightSpec spec{.name = std::move(name), .kind = kind, .cols = cols};
  for (const auto& part : parts) {
    spec.part_rows.push_back(static_cast<int64_t>(part.size()) / cols);
  }
  const WeightId id = backend_->declare_weight(spec);
  specs_.push_back(std::move(spec));
  values_.push_back(std::move(parts));
  return id;
}

void Rig::set_weight(WeightId id, std::vector<std::vector<float>> parts) {
  values_[static_cast<size_t>(id)] = std::move(parts);
}

void Rig::perturb_weights(double relative, uint64_t signs) {
  Numbers coin(signs);
  for (auto& parts : values_) {
    for (std::vector<float>& part : parts) {
      part = rounded(std::move(part), shape_.dtype);
      for (float& value : part) {
        value = static_cast<float>(value * (1 + (coin.below(2) == 0 ? relative : -relative)));
      }
    }
  }
}

void Rig::stage() {
  backend_->begin_staging();
  for (size_t w = 0; w < specs_.size(); ++w) {
    for (size_t part = 0; part < values_[w].size(); ++part) {
      const int64_t rows = specs_[w].part_rows[part];
      const ConstTensor source{values_[w][part].data(), DType::kF32, {rows, specs_[w].cols}};
      backend_->load_weight(static_cast<WeightId>(w), static_cast<int32_t>(part), source,
                            {0, rows});
    }
  }
}

void Rig::commit() {
  stage();
  backend_->commit_weights();
  is_committed_ = true;
}

Tensor Rig::tensor(DType dtype, int64_t rows, int64_t cols, const std::vector<float>& values) {
  Tensor tensor{.dtype = dtype, .shape = {rows, cols}};
  buffers_.push_back(backend_->alloc(tensor.bytes()));
  tensor.data = buffers_.back().data;
  if (values.empty()) return tensor;
  if (dtype == DType::kF32) {
    backend_->upload(buffers_.back(), values.data(), tensor.bytes());
  } else {
    std::vector<uint16_t> bits;
    for (const float value : values) bits.push_back(f32_to_bf16(value));
    backend_->upload(buffers_.back(), bits.data(), tensor.bytes());
  }
  return tensor;
}

std::vector<float> Rig::read(const Tensor& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.num_elements()));
  const Buffer source{tensor.data, tensor.bytes()};
  if (tensor.dtype == DType::kF32) {
    backend_->download(values.data(), source, tensor.bytes());
    return values;
  }
  std::vector<uint16_t> bits(values.size());
  backend_->download(bits.data(), source, tensor.bytes());
  for (size_t i = 0; i < bits.size(); ++i) values[i] = bf16_to_f32(bits[i]);
  return values;
}

StepResult Rig::run(StepPlan plan, const Ops& ops) {
  backend_->set_program(std::make_shared<OpsProgram>(ops));
  return run(std::move(plan));
}

StepResult Rig::run(StepPlan plan) {
  if (!is_committed_) commit();
  return backend_->wait(backend_->submit(std::move(plan)), soon());
}

Deadline soon() {
  return std::chrono::steady_clock::now() + std::chrono::minutes(1);
}

std::vector<StepResult> run_ahead(Backend& backend, const std::vector<StepPlan>& plans) {
  std::vector<StepResult> results;
  StepHandle last = backend.submit(plans.front());
  for (size_t i = 1; i <= plans.size(); ++i) {
    const StepHandle next = i < plans.size() ? backend.submit(plans[i]) : 0;
    results.push_back(backend.wait(last, soon()));
    last = next;
  }
  return results;
}

std::vector<int32_t> page_range(int32_t first, int32_t count) {
  std::vector<int32_t> pages(static_cast<size_t>(count));
  std::iota(pages.begin(), pages.end(), first);
  return pages;
}

void add_sequence(StepPlan& plan, const std::vector<int32_t>& ids, int32_t first_position,
                  const std::vector<int32_t>& pages, int32_t slot) {
  plan.sequences.push_back({.slot = slot,
                            .row_begin = static_cast<int32_t>(plan.input_ids.size()),
                            .num_rows = static_cast<int32_t>(ids.size()),
                            .page_table_begin = static_cast<int32_t>(plan.page_tables.size()),
                            .num_pages = static_cast<int32_t>(pages.size())});
  plan.input_ids.insert(plan.input_ids.end(), ids.begin(), ids.end());
  for (size_t i = 0; i < ids.size(); ++i) {
    plan.positions.push_back(first_position + static_cast<int32_t>(i));
  }
  plan.page_tables.insert(plan.page_tables.end(), pages.begin(), pages.end());
}

StepPlan plan_of_rows(int64_t rows) {
  StepPlan plan;
  add_sequence(plan, std::vector<int32_t>(static_cast<size_t>(rows), 0), 0,
               page_range(0, static_cast<int32_t>((rows + 15) / 16)));
  return plan;
}

void expect_within(const std::vector<float>& got, const std::vector<float>& want,
                   const std::vector<double>& bound, const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(static_cast<double>(got[i]) - want[i]);
    ASSERT_TRUE(error <= bound[i]) << what << ", element " << i << ": got " << got[i] << ", want "
                                   << want[i] << ", error " << error << " > bound " << bound[i];
  }
}

void expect_same_bits(const std::vector<float>& got, const std::vector<float>& want,
                      const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(std::bit_cast<uint32_t>(got[i]), std::bit_cast<uint32_t>(want[i]))
        << what << ", element " << i << ": got " << got[i] << ", want " << want[i];
  }
}

void expect_same_result(const HeadResult& got, const HeadResult& want, const std::string& what) {
  EXPECT_EQ(got.token, want.token) << what;
  EXPECT_EQ(got.position, want.position) << what;
  EXPECT_EQ(got.finish, want.finish) << what;
  EXPECT_EQ(got.is_finite, want.is_finite) << what;
  expect_same_bits({got.logprob, got.scaled_logprob, got.support_logmass, got.entropy},
                   {want.logprob, want.scaled_logprob, want.support_logmass, want.entropy},
                   what + " (logprob, scaled_logprob, support_logmass, entropy)");
}

std::string error_text(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "no error was thrown";
  return "";
}

}  // namespace rollpack::kernels::testing
