// What steps cost at least is the same however they are batched: the sum over steps equals the
// workload's own count, whatever is padded, recomputed or shared.
#include "rollout/measurement/step_meter.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "rollout/bench/machine_roof.h"
#include "rollout/bench/percentile.h"
#include "rollout/bench/workload.h"
#include "rollout/engine/engine.h"
#include "tests/rollout/engine/simulated_backend.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;

constexpr int32_t kPageTokens = 4;

ModelConfig small_model() {
  ModelConfig model;
  model.hidden_size = 6;
  model.num_attention_heads = 4;
  model.num_key_value_heads = 2;
  model.head_dim = 3;
  model.intermediate_size = 10;
  model.vocab_size = 100;
  model.num_hidden_layers = 3;
  model.layer_windows = {0, 5, 0};
  return model;
}

TEST(Roofline, CountsVisiblePairsAsARowByRowCountDoes) {
  for (const int32_t window : {0, 1, 3, 7, 50}) {
    for (int64_t begin = 0; begin < 12; ++begin) {
      for (int64_t end = begin; end < 14; ++end) {
        double expected = 0;
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t key = 0; key <= row; ++key) expected += window == 0 || row - key < window;
        }
        EXPECT_EQ(visible_pairs(begin, end, window), expected)
            << "window " << window << ", rows " << begin << " to " << end;
      }
    }
  }
}

TEST(Roofline, CountsParametersOfTheModel) {
  const ModelCost cost(small_model(), DType::kBF16);
  const double qkv = 6 * (4 + 2 + 2) * 3, o = 6 * 4 * 3, mlp = 3 * 6 * 10;
  EXPECT_EQ(cost.linear_flops(), 2 * 3 * (qkv + o + mlp));
  EXPECT_EQ(cost.layer_bytes(), 2 * 3 * (qkv + o + mlp));
  EXPECT_EQ(cost.head_flops(), 2 * 6 * 100);
  // Two layers see all of 7 keys, one sees 5 of them.
  EXPECT_EQ(cost.attention_flops(6, 7), 4 * 4 * 3 * (7 + 5 + 7));
}

Workload small_workload() {
  Workload workload;
  for (const auto& [prompt, responses] : std::vector<std::pair<int32_t, std::vector<int32_t>>>{
           {9, {3, 1, 8}}, {2, {5}}, {17, {1, 1}}, {6, {12, 7, 2, 9}}}) {
    workload.groups.push_back({.prompt_id = {.text = std::to_string(prompt)},
                               .prompt_tokens = prompt,
                               .response_tokens = responses});
    workload.num_samples += static_cast<int64_t>(responses.size());
    workload.num_prompt_tokens += prompt;
    for (const int32_t length : responses) workload.num_response_tokens += length;
  }
  return workload;
}

struct NoOutput : EngineOutput {
  void on_sample(bridge::Sample sample) override { num_tokens += sample.response_ids.size(); }
  void on_failed(bridge::FailedSample) override { ADD_FAILURE(); }
  void on_scored(uint64_t, bridge::Outcome, bridge::ScoredSequence) override {}
  size_t num_tokens = 0;
};

struct MeasuredRun {
  Measurement measured;
  EngineCounters counters;
};

MeasuredRun run(const std::string& batching, int32_t num_pages, int32_t budget) {
  const int32_t max_num_seqs = 4;
  SimulatedBackend backend({.num_pages = num_pages,
                            .page_tokens = kPageTokens,
                            .num_slots = max_num_seqs,
                            .max_rows = budget});
  NoOutput output;
  Engine engine({.max_num_seqs = max_num_seqs,
                 .max_num_batched_tokens = budget,
                 .page_tokens = kPageTokens,
                 .num_pages = num_pages,
                 .page_bytes = 24,
                 .max_positions = 1000},
                make_batching_policy(batching), backend, output);
  StepMeter meter(small_model(), DType::kBF16,
                  {.page_tokens = kPageTokens, .page_bytes = 24, .num_pages = num_pages});
  engine.set_observer(&meter);
  Config config;
  const Workload workload = small_workload();
  for (GroupRequest& group : make_groups(workload, config, small_model())) {
    engine.add(std::move(group));
  }
  while (engine.has_work()) engine.step(1s);
  EXPECT_EQ(output.num_tokens, static_cast<size_t>(workload.num_response_tokens));
  return {meter.take(), engine.state().counters};
}

TEST(StepMeter, CountsTheWorkloadsOwnFlopsUnderEveryModeAndBudget) {
  const Workload workload = small_workload();
  const double expected = workload_flops(workload, ModelCost(small_model(), DType::kBF16));
  bool was_preempted = false;
  for (const char* batching : {"continuous", "prepacked", "left_padded", "length_sorted"}) {
    for (const int32_t num_pages : {5, 6, 7, 40}) {
      for (const int32_t budget : {1, 5, 64}) {
        SCOPED_TRACE(testing::Message() << batching << ", " << num_pages << " pages, " << budget);
        const auto [measured, counters] = run(batching, num_pages, budget);
        was_preempted |= counters.num_preemptions > 0;
        const double flops =
            std::accumulate(measured.step_flops.begin(), measured.step_flops.end(), 0.0);
        EXPECT_NEAR(flops, expected, expected * 1e-6);  // steps are kept as f32
        EXPECT_EQ(static_cast<int64_t>(measured.step_flops.size()), counters.num_steps);
        EXPECT_EQ(static_cast<int64_t>(measured.first_token_times_s.size()), workload.num_samples);
        EXPECT_EQ(static_cast<int64_t>(measured.token_gaps_s.size()),
                  workload.num_response_tokens - workload.num_samples);
        EXPECT_LE(measured.peak_pages, num_pages);
        EXPECT_LE(measured.largest_step_rows, budget);
      }
    }
  }
  EXPECT_TRUE(was_preempted) << "nothing was recomputed, so nothing shows that it is not counted";
}

TEST(StepMeter, CountsAPageThatSequencesShareOnceAndTheHeadWhereItIsUsed) {
  const ModelCost cost(small_model(), DType::kBF16);
  StepMeter meter(small_model(), DType::kBF16,
                  {.page_tokens = kPageTokens, .page_bytes = 30, .num_pages = 20});
  const std::vector<int32_t> a = {3, 4, 5}, b = {3, 4, 9};
  StepWork work{.num_rows = 2};
  work.spans = {{.begin = 9, .end = 10, .pages = a}, {.begin = 8, .end = 9, .pages = b}};
  meter.on_step(work);
  // Two layers see pages 3, 4, 5, 9; the one with window 5 sees keys from 5 and 4: pages 4, 5, 9.
  const double kv = 10 * (4 + 3 + 4);
  EXPECT_FLOAT_EQ(meter.take().step_bytes.at(0), cost.layer_bytes() + kv);
  work.draws = {{.arrival = 1, .num_tokens = 3}};
  meter.on_step(work);
  const Measurement measured = meter.take();
  EXPECT_FLOAT_EQ(measured.step_bytes.at(0), cost.layer_bytes() + cost.head_bytes() + kv);
  EXPECT_EQ(measured.token_gaps_s, (std::vector<float>{0, 0})) << "three tokens of one step";
}

TEST(MachineRoof, TakesTheLargerLimitAndTheLargestDrift) {
  const MachineRoof roof = combine({.peak_flops = 100, .read_bandwidth_bytes_per_s = 50},
                                   {.peak_flops = 90, .read_bandwidth_bytes_per_s = 52});
  EXPECT_EQ(roof.limits.peak_flops, 100);
  EXPECT_EQ(roof.limits.read_bandwidth_bytes_per_s, 52);
  EXPECT_DOUBLE_EQ(roof.drift, 0.1);
  // Each step is bound by what takes it longer.
  EXPECT_DOUBLE_EQ(roof.least_seconds({.step_flops = {200, 1}, .step_bytes = {52, 104}}), 2 + 2);
}

TEST(Percentile, IsTheNearestRank) {
  EXPECT_EQ(percentile({7}, 0.99), 7);
  EXPECT_EQ(percentile({4, 1, 3, 2}, 0.5), 2);
  EXPECT_EQ(percentile({4, 1, 3, 2}, 0.99), 4);
}

}  // namespace
}  // namespace rollpack::rollout
