// Attention, the head with sampling, and the small row ops, each as a step of Qwen2.5-0.5B has
// them, at 128 rows: 16 groups of 8 siblings, 768 shared and 232 own tokens.
#include <fmt/format.h>

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "tests/bench/benchmarks.h"
#include "tests/bench/model_rig.h"
#include "tests/bench/op_rig.h"
#include "tests/bench/report.h"

namespace rollpack::bench {
namespace {

using kernels::Backend;
using kernels::StepPlan;
using kernels::Tensor;
using kernels::WeightId;
using kernels::WeightKind;

constexpr int kRepetitions = 5;

DecodeShape shape_of_run() {
  if (is_smoke()) return {.num_groups = 2, .group_size = 2, .prompt_tokens = 32, .own_tokens = 8};
  return {};
}

kernels::ModelShape model_of_run() {
  kernels::ModelShape model = kQwenShape;
  if (is_smoke()) model.L = 1, model.V = 2048, model.D = 128, model.F = 256;
  return model;
}

RigOptions options_for(const DecodeShape& shape, int num_threads) {
  return {.shape = model_of_run(), .num_threads = num_threads, .num_pages = shape.num_pages()};
}

// The rig last made, kept over the repetitions of a benchmark; one at a time, they are large.
template <class Rig>
Rig& kept(const std::string& key, const std::function<std::unique_ptr<Rig>()>& make) {
  static std::string current_key;
  static std::unique_ptr<Rig> current;
  if (current_key != key) {
    current.reset();
    current = make();
    current_key = key;
  }
  return *current;
}

Limit peak_here() {
  return peak_of(isa_of({}), DType::kBF16);
}

// All layers' attention of one step: the layers' caches are 520 MB, so nothing is cached.
void run_attention(benchmark::State& state) {
  const DecodeShape shape = shape_of_run();
  const auto num_threads = static_cast<int>(state.range(0));
  OpRig& rig = kept<OpRig>(fmt::format("attention {}", num_threads), [&] {
    auto made = std::make_unique<OpRig>(options_for(shape, num_threads));
    made->weight(WeightKind::kVector, {1}, 1);  // a backend without weights runs no step
    made->commit();
    fill_cache(made->backend(), made->options(), shape);
    return made;
  });
  const kernels::ModelShape& model = rig.options().shape;
  const double token_bytes = 2.0 * 2 * static_cast<double>(model.L * model.G * model.K);
  const double tokens =
      shape.num_groups *
      (shape.prompt_tokens + shape.group_size * static_cast<double>(shape.own_tokens));
  set_work(state, {.flops = decode_flops(model, shape).attention,
                   .bytes = tokens * token_bytes,
                   .peak = peak_here(),
                   .num_threads = num_threads});
  const Tensor q = rig.tensor(DType::kBF16, shape.num_rows(), model.H * model.K);
  const Tensor out = rig.tensor(DType::kBF16, shape.num_rows(), model.H * model.K);
  const StepPlan plan = decode_plan(shape);
  for (auto _ : state) {
    state.SetIterationTime(rig.run(plan, [&](Backend& backend) {
      for (int32_t layer = 0; layer < model.L; ++layer) {
        backend.attention({.layer = layer, .q = q, .out = out});
      }
    }));
  }
}

// Logits of every row against the vocabulary, a sample and its logprobs.
void run_head(benchmark::State& state, float temperature) {
  const auto num_threads = static_cast<int>(state.range(1));
  DecodeShape shape{.num_groups = static_cast<int32_t>(state.range(0)),
                    .group_size = 1,
                    .prompt_tokens = 16,
                    .own_tokens = 16,
                    .temperature = temperature};
  constexpr WeightId kHead = 0;
  OpRig& rig = kept<OpRig>(fmt::format("head {} {}", shape.num_groups, num_threads), [&] {
    auto made = std::make_unique<OpRig>(options_for(shape, num_threads));
    const kernels::ModelShape& model = made->options().shape;
    made->weight(WeightKind::kLmHead, {model.V}, model.D);
    made->commit();
    return made;
  });
  const kernels::ModelShape& model = rig.options().shape;
  const double elements = static_cast<double>(model.V * model.D);
  set_work(state, {.flops = decode_flops(model, shape).head,
                   .bytes = 2 * elements,
                   .peak = peak_here(),
                   .num_threads = num_threads});
  const Tensor in = rig.tensor(DType::kBF16, shape.num_rows(), model.D);
  const StepPlan plan = decode_plan(shape);
  for (auto _ : state) {
    state.SetIterationTime(
        rig.run(plan, [&](Backend& backend) { backend.lm_head({.weight = kHead, .in = in}); }));
  }
}

// Norm and rotation move rows, they hardly compute: held to the bytes that they read.
void run_row_op(benchmark::State& state, bool is_norm) {
  const auto num_threads = static_cast<int>(state.range(1));
  const auto rows = static_cast<int32_t>(state.range(0));
  const DecodeShape shape{
      .num_groups = rows, .group_size = 1, .prompt_tokens = 16, .own_tokens = 16};
  OpRig rig(options_for(shape, num_threads));
  const kernels::ModelShape& model = rig.options().shape;
  const WeightId weight = rig.weight(WeightKind::kVector, {model.D}, 1);
  rig.commit();
  const int64_t qkv_cols = (model.H + 2 * model.G) * model.K;
  const Tensor in = rig.tensor(DType::kF32, rows, is_norm ? model.D : qkv_cols);
  const Tensor out = rig.tensor(DType::kBF16, rows, is_norm ? model.D : model.H * model.K);
  const Tensor table = rig.tensor(DType::kF32, 64, model.K);
  set_work(state, {.bytes = static_cast<double>(in.bytes()), .num_threads = num_threads});
  const StepPlan plan = decode_plan(shape);
  constexpr int32_t kCalls = 24;  // as a step has layers
  for (auto _ : state) {
    const double seconds = rig.run(plan, [&](Backend& backend) {
      for (int32_t call = 0; call < kCalls; ++call) {
        if (is_norm) {
          backend.rms_norm({.weight = weight, .in = in, .out = out});
        } else {
          backend.rope_append({.layer = static_cast<int32_t>(call % model.L),
                               .qkv = in,
                               .rope_table = table,
                               .q = out});
        }
      }
    });
    state.SetIterationTime(seconds / kCalls);
  }
}

// A whole decode step; its line says what share of it attention and sampling have. Sampling is what
// the head takes longer than its FLOPs do at the rate of the step's own linear layers.
void run_step(benchmark::State& state, float temperature) {
  DecodeShape shape = shape_of_run();
  shape.temperature = temperature;
  const auto num_threads = static_cast<int>(state.range(0));
  ModelRig& rig = kept<ModelRig>(fmt::format("{}", num_threads), [&] {
    auto made = std::make_unique<ModelRig>(options_for(shape, num_threads), 1024);
    fill_cache(made->backend(), made->options(), shape);
    return made;
  });
  const StepFlops flops = decode_flops(rig.options().shape, shape);
  set_work(state, {.flops = flops.total(), .peak = peak_here(), .num_threads = num_threads});
  const StepPlan plan = decode_plan(shape);
  kernels::StepProfile profile;
  double wall_s = 0;
  rig.run(plan);
  for (auto _ : state) {
    const StepTime time = rig.run(plan);
    state.SetIterationTime(time.wall_s);
    wall_s += time.wall_s;
    profile.add(time.profile);
  }
  std::map<std::string, double> ops_s;  // linear layers together
  double in_ops_s = 0;
  for (const kernels::OpProfile& op : profile.ops) {
    ops_s[op.name.starts_with("linear ") ? "linear" : op.name] += op.seconds;
    in_ops_s += op.seconds;
  }
  for (const auto& [name, seconds] : ops_s) set_note(state, "% " + name, 100 * seconds / wall_s);
  const double product_s = ops_s["linear"] * flops.head / flops.linear;
  set_note(state, "% sampling", 100 * (ops_s["lm_head"] - product_s) / wall_s);
  set_note(state, "% outside of ops", 100 * (wall_s - in_ops_s) / wall_s);
}

void finish(benchmark::internal::Benchmark* added, double min_time) {
  added->UseManualTime();
  if (!is_smoke()) added->MinTime(min_time)->Repetitions(kRepetitions);
}

}  // namespace

void add_op_benchmarks() {
  using benchmark::RegisterBenchmark;
  finish(RegisterBenchmark("attention/decode", run_attention)->ArgName("threads")->Arg(2)->Arg(1),
         0.1);
  for (const float temperature : {1.0f, 0.7f}) {
    const std::string suffix = fmt::format("T={}", temperature);
    auto* head = RegisterBenchmark(("lm_head/" + suffix).c_str(), run_head, temperature);
    head->ArgNames({"rows", "threads"});
    if (is_smoke()) {
      head->Args({4, 2});
    } else {
      head->Args({128, 2})->Args({1, 2})->Args({128, 1});
    }
    finish(head, 0.1);
  }
  for (const bool is_norm : {true, false}) {
    auto* op = RegisterBenchmark(is_norm ? "rms_norm" : "rope_append", run_row_op, is_norm);
    op->ArgNames({"rows", "threads"})->Args({128, 2})->Args({1, 2})->Args({128, 1});
    finish(op, 0.05);
  }
  for (const float temperature : {1.0f, 0.7f}) {
    const std::string name = fmt::format("step/T={}", temperature);
    auto* step = RegisterBenchmark(name.c_str(), run_step, temperature)->ArgName("threads");
    step->Arg(2);
    if (temperature == 1.0f) step->Arg(1);
    finish(step, 0.5);
  }
}

}  // namespace rollpack::bench
