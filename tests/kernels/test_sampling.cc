// Draws of every backend: their distribution, the interval of the cumulative distribution they fall
// in, truncation on five tokens worked by hand, and how samples end.
#include <map>
#include <set>

#include "kernels/philox.h"
#include "tests/kernels/head_rig.h"
#include "tests/sanitized.h"

namespace rollpack::kernels::testing {
namespace {

using Sampling = BackendTest;

constexpr int32_t kSlots = 256;

// One step: draw `kSlots` samples of row 0 at `position`, slot s as sample_index s.
StepPlan draw_plan(const HeadRig& rig, const SamplingParams& sampling, int32_t position,
                   const std::vector<int32_t>& stops = {}, int32_t min_position = 0) {
  StepPlan plan = rig.plan();
  for (int32_t s = 0; s < kSlots; ++s) {
    plan.slot_inits.push_back({.slot = s,
                               .sampling = sampling,
                               .seed = 42,
                               .prompt_hash = 0x1234567890abcdefull,
                               .sample_index = static_cast<uint32_t>(s),
                               .next_position = position,
                               .min_position = min_position,
                               .end_position = position + 5,
                               .stop_token_ids = stops});
    plan.samples.push_back({0, s});
  }
  return plan;
}

std::vector<double> softmax(const std::vector<float>& logits, float temperature) {
  std::vector<double> p;
  const double max = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const float x : logits) {
    p.push_back(std::exp((x - max) * static_cast<double>(1.0f / temperature)));
    total += p.back();
  }
  for (double& x : p) x /= total;
  return p;
}

// The chi-square quantile that chance exceeds once in a million (Wilson and Hilferty, 1931).
double chi_square_limit(double degrees) {
  const double t = 2 / (9 * degrees);
  return degrees * std::pow(1 - t + 4.7534 * std::sqrt(t), 3);
}

TEST_P(Sampling, DrawsFollowTheSoftmaxAndTheCumulativeDistribution) {
  const bool is_fast = takes_all_cases(GetParam()) && !kIsSanitized;
  const int32_t num_steps = is_fast ? 120 : 12;
  for (const int64_t V : cases_of<int64_t>(GetParam(), {5, 1000, 1024, 2500, 1025}, 2)) {
    const auto logits = Numbers(static_cast<uint64_t>(V)).vector(V, 3.0f);
    const float temperature = V == 1025 ? 0.8f : 1.0f;
    const auto p = softmax(logits, temperature);
    HeadRig rig(GetParam(), {logits}, DType::kF32, {.max_num_seqs = kSlots});
    std::vector<double> count(static_cast<size_t>(V), 0.0), cdf(static_cast<size_t>(V) + 1, 0.0);
    for (size_t v = 0; v < p.size(); ++v) cdf[v + 1] = cdf[v] + p[v];
    // Relative error of a block's mass: its terms' shifts and exps, and at most 1024 additions.
    const double slack = gamma_of(1032) + 2 * (kExpError + 2 * kUnitF32 * 8.0 / temperature);
    for (int32_t position = 1; position <= num_steps; ++position) {
      const StepResult result = rig.run(draw_plan(rig, {.temperature = temperature}, position));
      for (const HeadResult& got : result.samples) {
        const double u =
            sampling_uniform(42, 0x1234567890abcdefull, static_cast<uint32_t>(got.slot),
                             static_cast<uint32_t>(position));
        const auto token = static_cast<size_t>(got.token);
        ASSERT_GE(u, cdf[token] - slack) << "V " << V << ", token " << token;
        ASSERT_LE(u, cdf[token + 1] + slack) << "V " << V << ", token " << token;
        EXPECT_EQ(got.position, position);
        ++count[token];
      }
    }
    double chi_square = 0, cells = 0, expected = 0, seen = 0;
    for (size_t v = 0; v < p.size(); ++v) {  // neighbours pooled to 20 expected draws a cell
      expected += p[v] * num_steps * kSlots;
      seen += count[v];
      if (expected < 20 && v + 1 < p.size()) continue;
      chi_square += (seen - expected) * (seen - expected) / expected;
      ++cells;
      expected = seen = 0;
    }
    EXPECT_LE(chi_square, chi_square_limit(cells - 1)) << "V " << V << ", cells " << cells;
  }
}

// Probabilities 1/2, 1/4, 1/8, 1/16, 1/16 on ids 1, 4, 2, 0, 3: order by id is not by probability.
const std::vector<float> kFive = {-4 * 0x1.62e43p-1f, -1 * 0x1.62e43p-1f, -3 * 0x1.62e43p-1f,
                                  -4 * 0x1.62e43p-1f, -2 * 0x1.62e43p-1f};

struct Truncation {
  std::string name;
  SamplingParams sampling;
  std::set<int32_t> support;
  double mass;
};

const std::vector<Truncation> kTruncations = {
    {"nothing cut", {}, {0, 1, 2, 3, 4}, 1},
    {"top_k off", {.top_k = -1}, {0, 1, 2, 3, 4}, 1},
    {"top_k beyond V", {.top_k = 9}, {0, 1, 2, 3, 4}, 1},
    {"top_k 1", {.top_k = 1}, {1}, 0.5},
    {"top_k 2", {.top_k = 2}, {1, 4}, 0.75},
    {"top_k 4 takes the lower id of a tie", {.top_k = 4}, {0, 1, 2, 4}, 0.9375},
    {"top_p keeps the crossing token", {.top_p = 0.7f}, {1, 4}, 0.75},
    {"top_p just above a step", {.top_p = 0.76f}, {1, 2, 4}, 0.875},
    {"top_p takes the lower id of a tie", {.top_p = 0.9f}, {0, 1, 2, 4}, 0.9375},
    {"top_p of almost nothing keeps one", {.top_p = 1e-6f}, {1}, 0.5},
    {"min_p relative to the largest", {.min_p = 0.2f}, {1, 2, 4}, 0.875},
    {"min_p 1 keeps the largest", {.min_p = 1.0f}, {1}, 0.5},
    {"min_p below all ratios", {.min_p = 0.1f}, {0, 1, 2, 3, 4}, 1},
    // Of the top three, 4/7 reaches 0.55; of all five, 1/2 would not.
    {"top_p after top_k is renormalised", {.top_k = 3, .top_p = 0.55f}, {1}, 0.5},
    {"top_k then min_p", {.top_k = 4, .min_p = 0.2f}, {1, 2, 4}, 0.875},
    // Squares: 1/4, 1/16, 1/64, 1/256 twice of 43/128: ratios 1, 1/4, 1/16, 1/64.
    {"truncation sees the temperature",
     {.temperature = 0.5f, .min_p = 0.1f},
     {1, 4},
     (0.25 + 0.0625) / (0.25 + 0.0625 + 0.015625 + 2 * 0.00390625)},
};

TEST_P(Sampling, TruncationOfFiveTokensKeepsTheSupportWorkedByHand) {
  HeadRig rig(GetParam(), {kFive}, DType::kF32, {.max_num_seqs = kSlots});
  for (const Truncation& c : kTruncations) {
    std::map<int32_t, int32_t> seen;
    for (const int32_t position : numbers_of(GetParam(), 1, 4, 1)) {
      for (const HeadResult& got : rig.run(draw_plan(rig, c.sampling, position)).samples) {
        ++seen[got.token];
        ASSERT_NEAR(std::exp(got.support_logmass), c.mass, 1e-6) << c.name;
        ASSERT_EQ(got.support_logmass == 0.0f, c.mass == 1) << c.name;
      }
    }
    std::set<int32_t> support;
    for (const auto& [token, count] : seen) support.insert(token);
    EXPECT_EQ(support, c.support) << c.name;
  }
}

TEST_P(Sampling, TruncatedDrawsFollowTheRenormalisedDistribution) {
  HeadRig rig(GetParam(), {kFive}, DType::kF32, {.max_num_seqs = kSlots});
  std::map<int32_t, double> count;
  const int32_t num_steps = takes_all_cases(GetParam()) ? 100 : 8;
  for (int32_t position = 1; position <= num_steps; ++position) {
    for (const HeadResult& got : rig.run(draw_plan(rig, {.top_k = 3}, position)).samples) {
      ++count[got.token];
    }
  }
  double chi_square = 0;
  for (const auto& [token, p] : {std::pair{1, 4.0 / 7}, {4, 2.0 / 7}, {2, 1.0 / 7}}) {
    const double expected = p * num_steps * kSlots;
    chi_square += (count[token] - expected) * (count[token] - expected) / expected;
  }
  EXPECT_LE(chi_square, chi_square_limit(2));
}

TEST_P(Sampling, SupportMassOfALargeVocabularyIsTheKeptShare) {
  constexpr int64_t V = 2500;
  const auto logits = Numbers(99).vector(V, 4.0f);
  const auto p = softmax(logits, 1.0f);
  auto sorted = p;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  HeadRig rig(GetParam(), {logits}, DType::kF32, {.max_num_seqs = kSlots});
  for (const int32_t top_k : cases_of<int32_t>(GetParam(), {1, 40, 1024, 2499}, 2)) {
    double mass = 0;
    for (int32_t i = 0; i < top_k; ++i) mass += sorted[static_cast<size_t>(i)];
    for (const HeadResult& got : rig.run(draw_plan(rig, {.top_k = top_k}, 1)).samples) {
      ASSERT_NEAR(std::exp(got.support_logmass), mass, 1e-6) << top_k;
      ASSERT_GE(p[static_cast<size_t>(got.token)], sorted[static_cast<size_t>(top_k - 1)]);
    }
  }
}

TEST_P(Sampling, TiesAcrossBlocksAreCutByLowerId) {
  HeadRig rig(GetParam(), {std::vector<float>(2500, 1.0f)}, DType::kF32, {.max_num_seqs = kSlots});
  for (const int32_t top_k : cases_of<int32_t>(GetParam(), {1, 64, 1024, 1025, 1100}, 2)) {
    for (const HeadResult& got : rig.run(draw_plan(rig, {.top_k = top_k}, 1)).samples) {
      ASSERT_LT(got.token, top_k);
      ASSERT_NEAR(std::exp(got.support_logmass), top_k / 2500.0, 1e-6);
    }
  }
}

TEST_P(Sampling, MinTokensTakesStopsOutOfTheSupport) {
  HeadRig rig(GetParam(), {kFive}, DType::kF32, {.max_num_seqs = kSlots});
  const std::vector<int32_t> stops = {1, 2};  // 1/2 + 1/8
  std::set<int32_t> before, behind;
  for (const HeadResult& got : rig.run(draw_plan(rig, {}, 7, stops, 8)).samples) {
    before.insert(got.token);
    ASSERT_EQ(got.finish, SlotFinish::kRunning);
    ASSERT_NEAR(std::exp(got.support_logmass), 0.375, 1e-6);
    // The scaled distribution is still that of the full vocabulary.
    ASSERT_NEAR(std::exp(got.scaled_logprob), got.token == 4 ? 0.25 : 0.0625, 1e-6);
  }
  EXPECT_EQ(before, (std::set<int32_t>{0, 3, 4}));
  for (const HeadResult& got : rig.run(draw_plan(rig, {}, 8, stops, 8)).samples) {
    behind.insert(got.token);
    ASSERT_EQ(got.finish == SlotFinish::kStop, got.token == 1 || got.token == 2);
    ASSERT_EQ(got.support_logmass, 0.0f);
  }
  EXPECT_EQ(behind, (std::set<int32_t>{0, 1, 2, 3, 4}));
}

TEST_P(Sampling, MinTokensComesBeforeTopKAndHoldsForGreedy) {
  HeadRig rig(GetParam(), {kFive}, DType::kF32, {.max_num_seqs = kSlots});
  for (const HeadResult& got : rig.run(draw_plan(rig, {.top_k = 1}, 7, {1}, 8)).samples) {
    ASSERT_EQ(got.token, 4);
    ASSERT_NEAR(std::exp(got.support_logmass), 0.25, 1e-6);
  }
  for (const HeadResult& got : rig.run(draw_plan(rig, {.temperature = 0}, 7, {1}, 8)).samples) {
    ASSERT_EQ(got.token, 4);
    ASSERT_EQ(got.support_logmass, 0.0f);
  }
}

TEST_P(Sampling, SamplesEndWithStopOrAtTheirLength) {
  HeadRig rig(GetParam(), {kFive});
  StepPlan plan = rig.plan();
  plan.slot_inits = {
      {.slot = 0, .sampling = {.temperature = 0}, .next_position = 5, .end_position = 7},
      {.slot = 1, .sampling = {.temperature = 0}, .next_position = 5, .end_position = 6},
      {.slot = 2,
       .sampling = {.temperature = 0},
       .next_position = 5,
       .end_position = 9,
       .stop_token_ids = {0, 1}},
      {.slot = 3,
       .sampling = {.temperature = 0},
       .next_position = 5,
       .end_position = 6,
       .stop_token_ids = {1}}};
  plan.samples = {{0, 0}, {0, 1}, {0, 2}, {0, 3}};
  const StepResult result = rig.run(plan);
  EXPECT_EQ(result.samples[0].finish, SlotFinish::kRunning);
  EXPECT_EQ(result.samples[1].finish, SlotFinish::kLength);
  EXPECT_EQ(result.samples[2].finish, SlotFinish::kStop);
  EXPECT_EQ(result.samples[3].finish, SlotFinish::kStop);  // a stop token is what ended it
  StepPlan next = rig.plan();
  next.samples = {{0, 0}};
  const HeadResult last = rig.run(next).samples[0];
  EXPECT_EQ(last.position, 6);
  EXPECT_EQ(last.finish, SlotFinish::kLength);
}

// The draw is a function of seed, hash, index and position; the slot and the step do not matter.
TEST_P(Sampling, DrawsDoNotDependOnSlotOrStep) {
  HeadRig rig(GetParam(), {Numbers(1).vector(1500, 2.0f)}, DType::kF32, {.max_num_seqs = kSlots});
  const StepResult want = rig.run(draw_plan(rig, {.top_p = 0.9f}, 3));
  for (const int32_t s : {0, 100, 255}) {
    StepPlan one = draw_plan(rig, {.top_p = 0.9f}, 3);
    one.slot_inits = {one.slot_inits[static_cast<size_t>(s)]};
    one.slot_inits[0].slot = 17;
    one.samples = {{0, 17}};
    expect_same_result(rig.run(one).samples[0], want.samples[static_cast<size_t>(s)],
                       "sample " + std::to_string(s));
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, Sampling, all_backends());

}  // namespace
}  // namespace rollpack::kernels::testing
