// Weights that are made rather than read.
#include "rollout/model/dummy_weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace rollpack::rollout {
namespace {

std::vector<float> rows_of(const DummySource& source, int64_t begin, int64_t end) {
  std::vector<std::byte> scratch;
  const std::byte* rows = source.read_rows(begin, end, scratch);
  std::vector<float> values(static_cast<size_t>((end - begin) * source.cols));
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t bits;
    std::memcpy(&bits, rows + i * 2, 2);
    values[i] = bf16_to_f32(bits);
  }
  return values;
}

TEST(DummyWeights, ARowIsTheSameHoweverItIsRead) {
  const DummySource source("model.layers.0.self_attn.q_proj.weight", 13, 37);  // no multiple of 4
  const std::vector<float> all = rows_of(source, 0, 13);
  for (int64_t row = 0; row < 13; ++row) {
    const std::vector<float> one = rows_of(source, row, row + 1);
    EXPECT_TRUE(std::equal(one.begin(), one.end(), all.begin() + row * 37)) << row;
  }
}

TEST(DummyWeights, NamesMakeOtherNumbersOfOneSpread) {
  const std::vector<float> a = rows_of(DummySource("a.weight", 64, 1000), 0, 64);
  const std::vector<float> b = rows_of(DummySource("b.weight", 64, 1000), 0, 64);
  EXPECT_NE(a, b);
  double sum = 0, squares = 0;
  for (const float value : a) {
    sum += value;
    squares += double{value} * value;
  }
  // Of 64,000 draws; five standard errors are 4e-4 and 1.1 % of the variance.
  EXPECT_NEAR(sum / 64000, 0, 4e-4);
  EXPECT_NEAR(std::sqrt(squares / 64000), 0.02, 0.02 * 0.007);
}

TEST(DummyWeights, NormsAreOne) {
  const std::vector<float> norm = rows_of(DummySource("model.norm.weight", 1, 48), 0, 1);
  EXPECT_EQ(norm, std::vector<float>(48, 1.0f));
}

}  // namespace
}  // namespace rollpack::rollout
