// Supports of top-k, top-p and min-p against their definition in f64, on logits with many ties.
#include "kernels/cpu/truncation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/float_mode.h"
#include "kernels/cpu/kernel_table.h"
#include "toy_model.h"

namespace rollpack::kernels::cpu {
namespace {

using testing::Numbers;

// Ids kept, ascending, by the definition: sort, cut, renormalise, cut.
std::vector<int32_t> kept_ids(const std::vector<float>& logits, float scale,
                              const SamplingParams& sampling,
                              const std::vector<int32_t>& banned) {
  std::vector<int32_t> ids;
  for (int32_t id = 0; id < static_cast<int32_t>(logits.size()); ++id) {
    if (!std::binary_search(banned.begin(), banned.end(), id)) ids.push_back(id);
  }
  const auto x = [&](int32_t id) {
    return static_cast<double>(logits[static_cast<size_t>(id)] * scale);
  };
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return x(a) > x(b); });
  if (ids.empty()) return ids;
  const double max = x(ids.front());
  if (sampling.top_k > 0 && sampling.top_k < static_cast<int32_t>(ids.size())) {
    ids.resize(static_cast<size_t>(sampling.top_k));
  }
  double total = 0;
  for (const int32_t id : ids) total += std::exp(x(id) - max);
  double running = 0;
  std::vector<int32_t> kept;
  for (const int32_t id : ids) {
    const double mass = std::exp(x(id) - max);
    if (mass >= static_cast<double>(sampling.min_p)) kept.push_back(id);
    running += mass;
    if (sampling.top_p < 1.0f && running >= static_cast<double>(sampling.top_p) * total) break;
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

struct Case {
  std::vector<float> logits;
  SamplingParams sampling;
  std::vector<int32_t> banned;
};

Case random_case(Numbers& numbers) {
  Case c;
  const int32_t V = 1 + numbers.below(300);
  const float step = numbers.below(2) == 0 ? 0.5f : 0.01f;
  for (int32_t i = 0; i < V; ++i) {
    c.logits.push_back(std::round(numbers.uniform(6.0f) / step) * step);
  }
  c.sampling.temperature = 0.3f + std::abs(numbers.uniform(2.0f));
  if (numbers.below(2) == 0) c.sampling.top_k = 1 + numbers.below(V + 5);
  if (numbers.below(2) == 0) c.sampling.top_p = 0.001f + std::abs(numbers.uniform(0.99f));
  if (numbers.below(3) == 0) c.sampling.min_p = std::abs(numbers.uniform(0.9f));
  for (int32_t i = 0; i < V && V > 4; i += 1 + V / 3) {
    if (numbers.below(3) == 0) c.banned.push_back(i);
  }
  return c;
}

// u sweeps the running mass of the support that the definition gives: the middle of each token's
// interval must draw that token, so the supports are the same, token for token.
TEST(Truncation, KeepsTheSupportOfItsDefinition) {
  const FlushSubnormalsScope flush;
  Numbers numbers(1);
  TruncatedSampler sampler;
  for (int round = 0; round < 300; ++round) {
    const Case c = random_case(numbers);
    const float scale = 1.0f / c.sampling.temperature;
    const std::vector<int32_t> kept = kept_ids(c.logits, scale, c.sampling, c.banned);
    double max = -1e300, total = 0, before = 0;
    for (const int32_t id : kept) {
      max = std::max(max, static_cast<double>(c.logits[static_cast<size_t>(id)] * scale));
    }
    const auto mass_of = [&](int32_t id) {
      return std::exp(static_cast<double>(c.logits[static_cast<size_t>(id)] * scale) - max);
    };
    for (const int32_t id : kept) total += mass_of(id);
    for (const int32_t id : kept) {
      const double mass = mass_of(id);
      const double u = (before + mass / 2) / total;
      before += mass;
      const TruncatedDraw draw =
          sampler.draw(kernel_table(Isa::kPortable), c.logits, scale, c.sampling, c.banned, u);
      // Tokens of less mass than the rounding of all before them have no middle to aim at.
      if (mass > 1e-5 * total) {
        ASSERT_EQ(draw.token, id) << "round " << round;
      }
      ASSERT_NEAR(draw.kept / total, 1.0, 1e-6) << "round " << round;
      ASSERT_NEAR(draw.max, max, 1e-6);
      ASSERT_EQ(draw.is_whole, kept.size() == c.logits.size());
    }
  }
}

TEST(Truncation, TiesGoToTheLowerId) {
  const FlushSubnormalsScope flush;
  const std::vector<float> logits = {1, 2, 2, 2, 0};
  TruncatedSampler sampler;
  const auto draw = [&](const SamplingParams& sampling, double u) {
    return sampler.draw(kernel_table(Isa::kPortable), logits, 1.0f, sampling, {}, u).token;
  };
  EXPECT_EQ(draw({.top_k = 1}, 0.999), 1);
  EXPECT_EQ(draw({.top_k = 2}, 0.499), 1);
  EXPECT_EQ(draw({.top_k = 2}, 0.501), 2);
  EXPECT_EQ(draw({.top_k = 2}, 0.999999), 2);
  // The three largest hold 0.84 of the mass: half of it needs two of them.
  EXPECT_EQ(draw({.top_p = 0.5f}, 0.999999), 2);
  EXPECT_EQ(draw({.top_p = 1e-6f}, 0.999999), 1);
  EXPECT_EQ(draw({.min_p = 1.0f}, 0.999999), 3);
  EXPECT_EQ(draw({.min_p = 0.3f}, 0.0), 0);
}

TEST(Truncation, CutsNothingWhereAllIsOff) {
  EXPECT_FALSE(truncates({}, 100));
  EXPECT_FALSE(truncates({.top_k = 100}, 100));
  EXPECT_FALSE(truncates({.top_k = -1}, 100));
  EXPECT_TRUE(truncates({.top_k = 99}, 100));
  EXPECT_TRUE(truncates({.top_p = 0.99f}, 100));
  EXPECT_TRUE(truncates({.min_p = 0.01f}, 100));
}

TEST(Truncation, GreedySkipsBannedIdsAndSaysWhenNoneIsLeft) {
  TruncatedSampler sampler;
  const std::vector<float> logits = {3, 5, 5, -0.0f};
  EXPECT_EQ(sampler.greedy(logits, {}), 1);
  EXPECT_EQ(sampler.greedy(logits, std::vector<int32_t>{1}), 2);
  EXPECT_EQ(sampler.greedy(logits, std::vector<int32_t>{0, 1, 2}), 3);
  EXPECT_EQ(sampler.greedy(logits, std::vector<int32_t>{0, 1, 2, 3}), -1);
}

}  // namespace
}  // namespace rollpack::kernels::cpu
