#include "kernels/cpu/polynomial.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/float_mode.h"
#include "kernels/cpu/kernel_table.h"

namespace rollpack::kernels::cpu {
namespace {

// Distance in units in the last place of `want`.
double ulps(float got, double want) {
  const int exponent = std::max(std::ilogb(want), -126);
  return std::abs(static_cast<double>(got) - want) / std::ldexp(1.0, exponent - 23);
}

TEST(Polynomial, ExpIsWithinOneUnitInTheLastPlace) {
  double worst = 0;
  // Every 97th float of both signs between 2^-40 and the limits.
  for (uint32_t bits = 0x2b800000u; bits < 0x42b20000u; bits += 97) {
    for (const float x : {std::bit_cast<float>(bits), -std::bit_cast<float>(bits)}) {
      if (x > kExpOverflow || x < kExpCutoff) continue;
      worst = std::max(worst, ulps(exp_f32(x), std::exp(static_cast<double>(x))));
    }
  }
  EXPECT_LE(worst, 1.0);
}

TEST(Polynomial, ExpIsExactWhereItMustBe) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(exp_f32(0.0f), 1.0f);
  EXPECT_EQ(exp_f32(-0.0f), 1.0f);
  EXPECT_EQ(std::bit_cast<uint32_t>(exp_f32(-kInfinity)), 0u);
  EXPECT_EQ(std::bit_cast<uint32_t>(exp_f32(std::nextafter(kExpCutoff, -kInfinity))), 0u);
  EXPECT_GT(exp_f32(kExpCutoff), std::numeric_limits<float>::min());
  EXPECT_EQ(exp_f32(kInfinity), kInfinity);
  EXPECT_LT(exp_f32(kExpOverflow), kInfinity);
  EXPECT_TRUE(std::isnan(exp_f32(std::bit_cast<float>(0x7f800001u))));
}

TEST(Polynomial, ExpLanesGiveTheScalarsBits) {
  const FlushSubnormalsScope flush;
  std::vector<float> x;
  for (uint32_t bits = 0; bits < 0x7f800000u; bits += 40009) {
    x.push_back(std::bit_cast<float>(bits));
    x.push_back(-std::bit_cast<float>(bits));
  }
  for (const float special : {0.0f, -0.0f, kExpCutoff, kExpOverflow,
                              std::numeric_limits<float>::infinity(),
                              -std::numeric_limits<float>::infinity()}) {
    x.push_back(special);
  }
  for (const Isa isa : supported_isas()) {
    std::vector<float> y(x.size());
    kernel_table(isa).shifted_exp(x.data(), static_cast<int64_t>(x.size()), 1.0f, 0.0f, y.data());
    for (size_t i = 0; i < x.size(); ++i) {
      ASSERT_EQ(std::bit_cast<uint32_t>(y[i]), std::bit_cast<uint32_t>(exp_f32(x[i])))
          << isa_name(isa) << ", x = " << x[i];
    }
    const float not_a_number = std::bit_cast<float>(0x7fc00001u);
    float result = 0;
    kernel_table(isa).shifted_exp(&not_a_number, 1, 1.0f, 0.0f, &result);
    EXPECT_TRUE(std::isnan(result)) << isa_name(isa);
  }
}

TEST(Polynomial, LogIsWithinTwoUnitsInTheLastPlace) {
  double worst = 0;
  uint64_t state = 1;
  for (int i = 0; i < 300000; ++i) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    const int exponent = i % 2 == 0 ? static_cast<int>(state >> 58) % 60 - 30 : 0;
    const double x = std::ldexp(1.0 + static_cast<double>(state >> 12) * 0x1p-52, exponent);
    const long double want = std::log(static_cast<long double>(x));
    const long double error = std::abs(static_cast<long double>(log_f64(x)) - want);
    const int unit = std::max(std::ilogb(static_cast<double>(want)), -52) - 52;
    worst = std::max(worst, static_cast<double>(error / std::ldexp(1.0L, unit)));
  }
  EXPECT_LE(worst, 2.0);
  EXPECT_EQ(log_f64(1.0), 0.0);
  EXPECT_EQ(log_f64(0.0), -std::numeric_limits<double>::infinity());
  EXPECT_TRUE(std::isnan(log_f64(-1.0)));
}

}  // namespace
}  // namespace rollpack::kernels::cpu
