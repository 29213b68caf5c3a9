#include "tests/bench/op_rig.h"

#include <chrono>
#include <cmath>
#include <numeric>
#include <utility>

namespace rollpack::bench {
namespace {

using kernels::Backend;
using kernels::BackendOptions;
using kernels::Buffer;
using kernels::StepPlan;
using kernels::Tensor;
using kernels::WeightId;
using kernels::WeightSpec;
using Clock = std::chrono::steady_clock;

constexpr int32_t kPageTokens = 16;  // of the cpu backend
constexpr auto kLongestStep = std::chrono::minutes(5);

// splitmix64, in [-scale, scale).
class Numbers {
 public:
  float next(float scale) {
    uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return scale * (static_cast<float>((z ^ (z >> 31)) >> 40) * 0x1p-23f - 1.0f);
  }

 private:
  uint64_t state_ = 0;
};

class TimedProgram final : public kernels::StepProgram {
 public:
  TimedProgram(const OpRig::Ops& ops, double& seconds) : ops_(ops), seconds_(seconds) {}
  void run(Backend& backend, int64_t, int64_t) override {
    const auto start = Clock::now();
    ops_(backend);
    seconds_ = std::chrono::duration<double>(Clock::now() - start).count();
  }

 private:
  const OpRig::Ops& ops_;
  double& seconds_;
};

BackendOptions backend_options(const RigOptions& options, int64_t kv_cache_bytes) {
  return {.num_threads = options.num_threads,
          .kv_cache_bytes = kv_cache_bytes,
          .max_num_seqs = options.max_num_seqs,
          .max_num_batched_tokens = options.max_rows};
}

}  // namespace

kernels::cpu::Isa isa_of(const RigOptions& options) {
  return options.isa.value_or(kernels::cpu::supported_isas().front());
}

std::unique_ptr<Backend> make_backend(const RigOptions& options) {
  const kernels::CpuOptions cpu{.isa = isa_of(options)};
  constexpr int64_t kAnyPage = int64_t{64} << 20;  // larger than a page of any model here
  const int64_t page_bytes =
      kernels::make_cpu_backend(options.shape, backend_options(options, kAnyPage), cpu)
          ->info()
          .kv.page_bytes;
  return kernels::make_cpu_backend(options.shape,
                                   backend_options(options, page_bytes * options.num_pages), cpu);
}

std::vector<uint16_t> random_bf16(int64_t count, float scale) {
  Numbers numbers;
  std::vector<uint16_t> values(static_cast<size_t>(count));
  for (uint16_t& value : values) value = f32_to_bf16(numbers.next(scale));
  return values;
}

void load_random_weights(Backend& backend, const std::vector<WeightSpec>& specs) {
  std::vector<uint16_t> values;
  int64_t values_cols = 0;
  backend.begin_staging();
  for (size_t w = 0; w < specs.size(); ++w) {
    for (size_t part = 0; part < specs[w].part_rows.size(); ++part) {
      const int64_t rows = specs[w].part_rows[part], cols = specs[w].cols;
      // Weights of one size follow each other and may have the same values.
      if (values.size() != static_cast<size_t>(rows * cols) || values_cols != cols) {
        values = random_bf16(rows * cols, 1.0f / std::sqrt(static_cast<float>(cols)));
        values_cols = cols;
      }
      backend.load_weight(static_cast<WeightId>(w), static_cast<int32_t>(part),
                          {values.data(), DType::kBF16, {rows, cols}}, {0, rows});
    }
  }
  backend.commit_weights();
}

OpRig::OpRig(const RigOptions& options) : options_(options), backend_(make_backend(options)) {}

OpRig::~OpRig() {
  for (const Buffer& buffer : buffers_) backend_->free(buffer);
}

WeightId OpRig::weight(kernels::WeightKind kind, std::vector<int64_t> part_rows, int64_t cols) {
  specs_.push_back({.name = "weight " + std::to_string(specs_.size()),
                    .kind = kind,
                    .part_rows = std::move(part_rows),
                    .cols = cols});
  return backend_->declare_weight(specs_.back());
}

void OpRig::commit() {
  load_random_weights(*backend_, specs_);
}

Tensor OpRig::tensor(DType dtype, int64_t rows, int64_t cols) {
  Tensor tensor{.dtype = dtype, .shape = {rows, cols}};
  buffers_.push_back(backend_->alloc(tensor.bytes()));
  tensor.data = buffers_.back().data;
  Numbers numbers;
  for (int64_t i = 0; i < tensor.num_elements(); ++i) {
    const float value = numbers.next(1.0f);
    if (dtype == DType::kF32) {
      tensor.as<float>()[i] = value;
    } else {
      tensor.as<uint16_t>()[i] = f32_to_bf16(value);
    }
  }
  return tensor;
}

double OpRig::run(StepPlan plan, const Ops& ops) {
  double seconds = 0;
  backend_->set_program(std::make_shared<TimedProgram>(ops, seconds));
  result_ = backend_->wait(backend_->submit(std::move(plan)), Clock::now() + kLongestStep);
  return seconds;
}

StepPlan plan_of_rows(int64_t rows) {
  StepPlan plan;
  const auto count = static_cast<int32_t>(rows);
  add_sequence(plan, count, 0, page_range(0, (count + kPageTokens - 1) / kPageTokens));
  return plan;
}

void add_sequence(StepPlan& plan, int32_t num_rows, int32_t first_position,
                  const std::vector<int32_t>& pages, int32_t slot) {
  plan.sequences.push_back({.slot = slot,
                            .row_begin = static_cast<int32_t>(plan.input_ids.size()),
                            .num_rows = num_rows,
                            .page_table_begin = static_cast<int32_t>(plan.page_tables.size()),
                            .num_pages = static_cast<int32_t>(pages.size())});
  for (int32_t i = 0; i < num_rows; ++i) {
    plan.input_ids.push_back((first_position + i) % 1000);
    plan.positions.push_back(first_position + i);
  }
  plan.page_tables.insert(plan.page_tables.end(), pages.begin(), pages.end());
}

std::vector<int32_t> page_range(int32_t first, int32_t count) {
  std::vector<int32_t> pages(static_cast<size_t>(count));
  std::iota(pages.begin(), pages.end(), first);
  return pages;
}

}  // namespace rollpack::bench
