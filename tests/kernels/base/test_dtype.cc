#include "kernels/base/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace rollpack {
namespace {

uint16_t bf16_of_bits(uint32_t bits) {
  return f32_to_bf16(std::bit_cast<float>(bits));
}

TEST(DType, BytesAndNamesAreThoseOfPyTorch) {
  EXPECT_EQ(dtype_bytes(DType::kF32), 4);
  EXPECT_EQ(dtype_bytes(DType::kBF16), 2);
  EXPECT_EQ(dtype_bytes(DType::kF16), 2);
  EXPECT_EQ(dtype_bytes(DType::kI32), 4);
  EXPECT_EQ(dtype_bytes(DType::kI64), 8);
  EXPECT_EQ(dtype_bytes(DType::kU8), 1);
  EXPECT_EQ(dtype_name(DType::kF32), "float32");
  EXPECT_EQ(dtype_name(DType::kBF16), "bfloat16");
  EXPECT_EQ(dtype_name(DType::kF16), "float16");
  EXPECT_EQ(dtype_name(DType::kI32), "int32");
  EXPECT_EQ(dtype_name(DType::kI64), "int64");
  EXPECT_EQ(dtype_name(DType::kU8), "uint8");
}

TEST(DType, Bf16RoundsTiesToEven) {
  EXPECT_EQ(bf16_of_bits(0x3f808000), 0x3f80);  // a tie, even below
  EXPECT_EQ(bf16_of_bits(0x3f818000), 0x3f82);  // a tie, even above
  EXPECT_EQ(bf16_of_bits(0x3f808001), 0x3f81);
  EXPECT_EQ(bf16_of_bits(0x3f807fff), 0x3f80);
  EXPECT_EQ(bf16_of_bits(0xbf818000), 0xbf82);
}

TEST(DType, Bf16CarriesIntoTheExponentAndOverflowsToInfinity) {
  EXPECT_EQ(bf16_of_bits(0x3fffffff), 0x4000);
  EXPECT_EQ(bf16_of_bits(0x7f7fffff), 0x7f80);
  EXPECT_EQ(bf16_of_bits(0x7f7f7fff), 0x7f7f);
  EXPECT_EQ(bf16_of_bits(0x7f800000), 0x7f80);
  EXPECT_EQ(bf16_of_bits(0xff800000), 0xff80);
}

TEST(DType, Bf16FlushesSubnormalsToAZeroOfTheirSign) {
  EXPECT_EQ(bf16_of_bits(0x00000001), 0x0000);
  EXPECT_EQ(bf16_of_bits(0x007fffff), 0x0000);  // would round up to the smallest normal
  EXPECT_EQ(bf16_of_bits(0x807fffff), 0x8000);
  EXPECT_EQ(bf16_of_bits(0x00800000), 0x0080);
  EXPECT_EQ(bf16_of_bits(0x80000000), 0x8000);
}

TEST(DType, Bf16KeepsNaNQuietAndNeverTurnsItIntoInfinity) {
  EXPECT_EQ(bf16_of_bits(0x7f800001), 0x7fc0);  // the payload's kept bits are all zero
  EXPECT_EQ(bf16_of_bits(0xffc12345), 0xffc1);
  EXPECT_TRUE(std::isnan(bf16_to_f32(bf16_of_bits(0x7fffffff))));
}

TEST(DType, EveryNormalBf16SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const bool is_subnormal = (half & 0x7f80) == 0;
    const bool is_signalling = (half & 0x7f80) == 0x7f80 && (half & 0x7f) != 0 && !(half & 0x40);
    if (is_subnormal || is_signalling) continue;
    ASSERT_EQ(f32_to_bf16(bf16_to_f32(half)), half);
  }
}

TEST(DType, F16GivesTheValueOfEveryHalf) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const int exponent = static_cast<int>(bits >> 10 & 31);
    const int mantissa = static_cast<int>(bits & 1023);
    const float got = f16_to_f32(static_cast<uint16_t>(bits));
    if (exponent == 31 && mantissa != 0) {
      ASSERT_TRUE(std::isnan(got)) << bits;
      continue;
    }
    double want = exponent == 31  ? std::numeric_limits<double>::infinity()
                  : exponent == 0 ? std::ldexp(mantissa, -24)
                                  : std::ldexp(1024 + mantissa, exponent - 25);
    if (bits & 0x8000) want = -want;
    ASSERT_EQ(got, want) << bits;
    ASSERT_EQ(std::signbit(got), std::signbit(want)) << bits;
  }
}

}  // namespace
}  // namespace rollpack
