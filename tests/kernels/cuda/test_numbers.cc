// What host and device compute alike: roundings, exp, log, and the rule of sums.
#include "kernels/cuda/numbers.h"

#include <bit>
#include <cmath>
#include <limits>

#include "kernels/cpu/polynomial.h"
#include "kernels/cuda/linear.h"
#include "tests/kernels/rig.h"

namespace rollpack::kernels::cuda {
namespace {

using testing::Numbers;

TEST(CudaNumbers, RoundingExpAndLogAreThoseOfTheCpu) {
  Numbers numbers(3);
  for (int i = 0; i < 200000; ++i) {
    const float any = std::bit_cast<float>(static_cast<uint32_t>(numbers.next()));
    ASSERT_EQ(rounded_to_bf16(any), f32_to_bf16(any)) << any;
    const float x = numbers.uniform(100.0f);
    ASSERT_EQ(bits_as<uint32_t>(exp_f32(x)), bits_as<uint32_t>(cpu::exp_f32(x))) << x;
    const double y = std::abs(static_cast<double>(any));
    ASSERT_EQ(bits_as<uint64_t>(log_f64(y)), bits_as<uint64_t>(cpu::log_f64(y))) << y;
  }
  EXPECT_EQ(exp_f32(0.0f), 1.0f);
  EXPECT_EQ(exp_f32(-infinity_f32()), 0.0f);
  EXPECT_TRUE(std::isnan(exp_f32(std::numeric_limits<float>::quiet_NaN())));
  EXPECT_FALSE(is_finite(infinity_f32()));
  EXPECT_TRUE(is_finite(std::numeric_limits<float>::max()));
}

TEST(SliceRule, SlicesAreFewWholeAndNeverEmpty) {
  for (const int64_t N : {1, 64, 65, 896, 1152, 4864, 8191, 8192, 9728, 28672}) {
    for (const int64_t K : {1, 15, 16, 17, 64, 127, 128, 129, 896, 4864, 4097, 14336}) {
      const SliceRule rule = slice_rule(N, K);
      EXPECT_TRUE(std::has_single_bit(static_cast<uint64_t>(rule.count)));
      EXPECT_LE(rule.count, kMaxSlices);
      EXPECT_EQ(rule.length % kSliceMultiple, 0);
      EXPECT_LT((rule.count - 1) * rule.length, K) << "N " << N << " K " << K;
      EXPECT_GE(rule.count * rule.length, K) << "N " << N << " K " << K;
    }
  }
}

TEST(SliceRule, NarrowWeightsAreSplitUntilTheyFillADevice) {
  const auto count = [](int64_t N, int64_t K) { return slice_rule(N, K).count; };
  EXPECT_EQ(count(896, 896), 8);  // 14 tiles: 112 blocks of 112 k
  EXPECT_EQ(slice_rule(896, 896).length, 112);
  EXPECT_EQ(count(896, 4864), 8);
  EXPECT_EQ(count(1152, 896), 8);
  EXPECT_EQ(count(9728, 896), 1);    // 152 tiles
  EXPECT_EQ(count(4096, 14336), 2);  // 64 tiles
  EXPECT_EQ(count(8192, 4096), 1);
  EXPECT_EQ(count(64, 32), 2);  // no more than whole products of 16
  EXPECT_EQ(count(64, 16), 1);
}

TEST(PackedRows, GateAndUpLieInGroupsOfEight) {
  EXPECT_EQ(packed_rows({.N = 20, .is_gated = true}), 48);
  EXPECT_EQ(packed_rows({.N = 20}), 20);
  std::vector<bool> is_taken(48);
  for (int64_t n = 0; n < 20; ++n) {
    for (const int part : {0, 1}) {
      const auto row = static_cast<size_t>(gated_row(n, part));
      EXPECT_FALSE(is_taken[row]);
      is_taken[row] = true;
    }
    EXPECT_EQ(gated_row(n, 1), gated_row(n, 0) + 8);
  }
}

}  // namespace
}  // namespace rollpack::kernels::cuda
