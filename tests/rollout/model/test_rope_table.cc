#include "rollout/model/rope_table.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace rollpack::rollout {
namespace {

struct Golden {
  size_t pair;
  double frequency;  // f32 in transformers
};

// transformers computes theta^(2i/K) in f32 by pow, whose error grows with the exponent's: 4
// roundings of relative size 2^-24 and the exponent's own, multiplied by ln(theta).
void expect_frequencies(const RopeConfig& rope, const std::vector<Golden>& golden) {
  const std::vector<double> got = rope_frequencies(rope, 64);
  ASSERT_EQ(got.size(), 32u);
  const double bound = (4 + std::log(rope.theta)) * std::ldexp(1.0, -24);
  for (const auto& [pair, frequency] : golden) {
    EXPECT_NEAR(got[pair] / frequency, 1.0, bound) << "pair " << pair;
  }
}

// Values of inv_freq, transformers 5.23, ROPE_INIT_FUNCTIONS["llama3"], theta 500000, K = 64,
// factor 8, low 1, high 4, original context 8192: pairs below 15 as they are, 15 to 17 blended, the
// rest divided.
TEST(RopeTable, Llama3FrequenciesAreThoseOfTransformers) {
  expect_frequencies({.theta = 500000.0,
                      .scaling = RopeScaling::kLlama3,
                      .factor = 8.0,
                      .low_freq_factor = 1.0,
                      .high_freq_factor = 4.0,
                      .original_max_position_embeddings = 8192},
                     {{0, 1.0},
                      {1, 0.663601279},
                      {7, 0.0566696189},
                      {14, 0.00321144611},
                      {15, 0.00137189368},
                      {16, 0.000524846022},
                      {17, 0.000178507791},
                      {18, 7.78465546e-05},
                      {31, 3.7673226e-07}});
}

// The same source, "linear", theta 10000, factor 4.
TEST(RopeTable, LinearFrequenciesAreThoseOfTransformers) {
  expect_frequencies({.theta = 10000.0, .scaling = RopeScaling::kLinear, .factor = 4.0},
                     {{0, 0.25}, {1, 0.18747355}, {15, 0.00333380373}, {31, 3.33380376e-05}});
}

TEST(RopeTable, RowsHoldCosinesThenSines) {
  const RopeConfig rope = {.theta = 10000.0};
  const std::vector<float> table = make_rope_table(rope, 4, 3);
  ASSERT_EQ(table.size(), 12u);
  // Position p, frequencies 1 and 0.01.
  for (int p = 0; p < 3; ++p) {
    const float* row = table.data() + 4 * p;
    EXPECT_FLOAT_EQ(row[0], static_cast<float>(std::cos(p)));
    EXPECT_FLOAT_EQ(row[1], static_cast<float>(std::cos(p * 0.01)));
    EXPECT_FLOAT_EQ(row[2], static_cast<float>(std::sin(p)));
    EXPECT_FLOAT_EQ(row[3], static_cast<float>(std::sin(p * 0.01)));
  }
}

TEST(RopeTable, EveryEntryIsRoundedOnceFromALongerMantissa) {
  for (const double theta : {10000.0, 1000000.0}) {
    const RopeConfig rope = {.theta = theta};
    const std::vector<double> frequencies = rope_frequencies(rope, 64);
    const std::vector<float> table = make_rope_table(rope, 64, 40000);
    for (int64_t position = 0; position < 40000; position += 31) {
      const float* row = table.data() + position * 64;
      for (size_t i = 0; i < 32; ++i) {
        const long double angle = static_cast<double>(position) * frequencies[i];
        ASSERT_EQ(row[i], static_cast<float>(std::cos(angle))) << position << ", " << i;
        ASSERT_EQ(row[32 + i], static_cast<float>(std::sin(angle))) << position << ", " << i;
      }
    }
  }
}

// A long table's rows are those of a short one: no recurrence that drifts.
TEST(RopeTable, ARowDoesNotDependOnTheTablesLength) {
  const RopeConfig rope = {.theta = 100000.0};
  const std::vector<float> longer = make_rope_table(rope, 64, 1000);
  const std::vector<float> shorter = make_rope_table(rope, 64, 10);
  EXPECT_TRUE(std::equal(shorter.begin(), shorter.end(), longer.begin()));
  for (size_t i = 0; i < 32; ++i) {  // cos^2 + sin^2 = 1 within the roundings of two f32 squares
    const double c = longer[999 * 64 + i], s = longer[999 * 64 + 32 + i];
    EXPECT_NEAR(c * c + s * s, 1.0, 4 * std::numeric_limits<float>::epsilon());
  }
}

}  // namespace
}  // namespace rollpack::rollout
