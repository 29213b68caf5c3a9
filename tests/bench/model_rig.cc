#include "tests/bench/model_rig.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "kernels/forwarding_backend.h"
#include "tests/bench/made_model.h"

namespace rollpack::bench {
namespace {

using kernels::Backend;
using kernels::ModelShape;
using kernels::StepPlan;
using kernels::Tensor;
using kernels::WeightId;
using Clock = std::chrono::steady_clock;

constexpr int32_t kPageTokens = 16;  // of the cpu backend
constexpr auto kLongestStep = std::chrono::minutes(5);

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int32_t pages_for(int32_t tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens;
}

// Pages of a group's prompt and of sample `member`'s own tokens, in the order of positions.
std::vector<int32_t> page_table(const DecodeShape& shape, int32_t group, int32_t member) {
  const int32_t shared = pages_for(shape.prompt_tokens), own = pages_for(shape.own_tokens);
  const int32_t first = group * (shared + shape.group_size * own);
  std::vector<int32_t> pages = page_range(first, shared);
  for (const int32_t page : page_range(first + shared + member * own, own)) pages.push_back(page);
  return pages;
}

// Plans of at most max_rows rows that together cover every token of the shape once.
std::vector<StepPlan> fill_plans(const DecodeShape& shape, int32_t max_rows) {
  std::vector<StepPlan> plans;
  const auto add = [&](int32_t begin, int32_t end, const std::vector<int32_t>& pages) {
    for (int32_t at = begin; at < end; at += max_rows) {
      plans.emplace_back();
      add_sequence(plans.back(), std::min(max_rows, end - at), at, pages);
    }
  };
  for (int32_t group = 0; group < shape.num_groups; ++group) {
    add(0, shape.prompt_tokens, page_table(shape, group, 0));
    for (int32_t member = 0; member < shape.group_size; ++member) {
      add(shape.prompt_tokens, shape.prompt_tokens + shape.own_tokens,
          page_table(shape, group, member));
    }
  }
  return plans;
}

// Keys and values from the same random rows in every step.
class FillProgram final : public kernels::StepProgram {
 public:
  FillProgram(Backend& backend, const RigOptions& options, const DecodeShape& shape)
      : backend_(backend), model_(options.shape) {
    qkv_ = random_tensor(options.max_rows, (model_.H + 2 * model_.G) * model_.K);
    table_ = random_tensor(shape.prompt_tokens + shape.own_tokens, model_.K);
    q_ = {.dtype = model_.dtype, .shape = {options.max_rows, model_.H * model_.K}};
    q_.data = backend.alloc(q_.bytes()).data;
  }
  void free() {
    for (const Tensor& tensor : {qkv_, table_, q_}) backend_.free({tensor.data, tensor.bytes()});
  }
  void run(Backend& backend, int64_t num_rows, int64_t) override {
    Tensor qkv = qkv_, q = q_;
    qkv.shape[0] = q.shape[0] = num_rows;
    for (int32_t layer = 0; layer < model_.L; ++layer) {
      backend.rope_append({.layer = layer, .qkv = qkv, .rope_table = table_, .q = q});
    }
  }

 private:
  Tensor random_tensor(int64_t rows, int64_t cols) {
    Tensor tensor{.dtype = DType::kF32, .shape = {rows, cols}};
    tensor.data = backend_.alloc(tensor.bytes()).data;
    const std::vector<uint16_t> values = random_bf16(rows * cols, 1.0f);
    for (size_t i = 0; i < values.size(); ++i) tensor.as<float>()[i] = bf16_to_f32(values[i]);
    return tensor;
  }

  Backend& backend_;
  const ModelShape model_;
  Tensor qkv_, table_, q_;
};

}  // namespace

// Notes what a model declares, so that it can be filled with random weights.
class ModelRig::DeclaredWeights final : public kernels::ForwardingBackend {
 public:
  DeclaredWeights(std::unique_ptr<Backend> inner, std::vector<kernels::WeightSpec>& specs)
      : ForwardingBackend(std::move(inner)), specs_(specs) {}

  WeightId declare_weight(const kernels::WeightSpec& spec) override {
    specs_.push_back(spec);
    return inner().declare_weight(spec);
  }

 private:
  std::vector<kernels::WeightSpec>& specs_;
};

ModelRig::ModelRig(const RigOptions& options, int64_t num_positions)
    : options_(options),
      backend_(std::make_unique<kernels::ProfiledBackend>(
          std::make_unique<DeclaredWeights>(make_backend(options), specs_), options.shape)) {
  const rollout::ModelConfig config = config_of(options.shape, num_positions);
  weights_ = std::make_unique<rollout::ModelWeights>(config, *backend_);
  load_random_weights(*backend_, specs_);
  transformer_ = std::make_shared<rollout::Transformer>(
      config, *weights_, *backend_, options.shape.dtype, options.max_rows, num_positions);
}

StepTime ModelRig::run(StepPlan plan) {
  backend_->set_program(transformer_);
  backend_->take();  // what was profiled while the cache was filled
  const auto start = Clock::now();
  backend_->wait(backend_->submit(std::move(plan)), Clock::now() + kLongestStep);
  const double wall_s = seconds_since(start);
  return {.profile = backend_->take(), .wall_s = wall_s};
}

int32_t DecodeShape::num_pages() const {
  return num_groups * (pages_for(prompt_tokens) + group_size * pages_for(own_tokens));
}

StepPlan decode_plan(const DecodeShape& shape) {
  StepPlan plan;
  const int32_t position = shape.prompt_tokens + shape.own_tokens - 1;
  for (int32_t row = 0; row < shape.num_rows(); ++row) {
    add_sequence(plan, 1, position,
                 page_table(shape, row / shape.group_size, row % shape.group_size), row);
    if (shape.temperature < 0) continue;
    plan.slot_inits.push_back({.slot = row,
                               .sampling = {.temperature = shape.temperature},
                               .sample_index = static_cast<uint32_t>(row),
                               .next_position = position + 1,
                               .end_position = position + 2});
    plan.samples.push_back({.row = row, .slot = row});
  }
  return plan;
}

void fill_cache(Backend& backend, const RigOptions& options, const DecodeShape& shape) {
  const auto program = std::make_shared<FillProgram>(backend, options, shape);
  backend.set_program(program);
  for (StepPlan& plan : fill_plans(shape, options.max_rows)) {
    backend.wait(backend.submit(std::move(plan)), Clock::now() + kLongestStep);
  }
  program->free();
}

StepFlops decode_flops(const ModelShape& model, const DecodeShape& shape) {
  const auto rows = static_cast<double>(shape.num_rows());
  const double keys = shape.prompt_tokens + shape.own_tokens;
  const auto layer =
      static_cast<double>((2 * model.H + 2 * model.G) * model.K * model.D + 3 * model.D * model.F);
  return {.linear = 2 * rows * static_cast<double>(model.L) * layer,
          .attention = 4 * rows * keys * static_cast<double>(model.L * model.H * model.K),
          .head = shape.temperature < 0 ? 0 : 2 * rows * static_cast<double>(model.D * model.V)};
}

}  // namespace rollpack::bench
