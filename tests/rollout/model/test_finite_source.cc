#include "rollout/model/finite_source.h"

#include <bit>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/base/dtype.h"
#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

// Long enough that a vector loop has a body and a rest, at every place of which something may be.
constexpr int64_t kRows = 3, kCols = 37;

template <class Bits>
std::string refusal_of(const std::vector<Bits>& elements, DType dtype, int64_t rows) {
  const auto cols = static_cast<int64_t>(elements.size()) / rows;
  const kernels::TensorSource tensor({elements.data(), dtype, {rows, cols}});
  const FiniteSource source("w", tensor);
  std::vector<std::byte> scratch;
  try {
    for (int64_t row = 0; row < rows; ++row) {
      EXPECT_EQ(source.read_rows(row, row + 1, scratch), tensor.read_rows(row, row + 1, scratch));
    }
    EXPECT_EQ(source.read_rows(0, rows, scratch), tensor.read_rows(0, rows, scratch));
  } catch (const Error& error) {
    EXPECT_EQ(error.info.code, ErrorCode::kInvalidArgument);
    return error.info.field + " = " + error.info.value;
  }
  return "";
}

TEST(FiniteSource, LetsEveryFiniteNumberThrough) {
  std::vector<uint16_t> halves;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) halves.push_back(static_cast<uint16_t>(bits));
  std::vector<uint16_t> bf16, f16;
  for (const uint16_t bits : halves) {
    if ((bits & 0x7f80) != 0x7f80) bf16.push_back(bits);
    if ((bits & 0x7c00) != 0x7c00) f16.push_back(bits);
  }
  EXPECT_EQ(refusal_of(bf16, DType::kBF16, 1), "");
  EXPECT_EQ(refusal_of(f16, DType::kF16, 1), "");
  const float largest = std::bit_cast<float>(0x7f7f7fffu);  // rounds down to the largest bfloat16
  EXPECT_EQ(
      refusal_of(std::vector<float>{0, -0.0f, 1e-45f, -1e-40f, largest, -largest}, DType::kF32, 2),
      "");
}

TEST(FiniteSource, NamesWhatIsNotFiniteWhereverItIs) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t col = 0; col < kCols; ++col) {
      const auto at = static_cast<size_t>(row * kCols + col);
      const std::string where = "w[" + std::to_string(row) + ", " + std::to_string(col) + "] = ";
      std::vector<float> f32(kRows * kCols, 0.5f);
      f32[at] = -infinity;
      EXPECT_EQ(refusal_of(f32, DType::kF32, kRows), where + "-inf");
      std::vector<uint16_t> halves(kRows * kCols, 0x3800);
      halves[at] = 0xff80;
      EXPECT_EQ(refusal_of(halves, DType::kBF16, kRows), where + "-inf");
      halves[at] = 0x7c00;
      EXPECT_EQ(refusal_of(halves, DType::kF16, kRows), where + "inf");
    }
  }
}

TEST(FiniteSource, RefusesNaNsOfEveryPayload) {
  for (const uint32_t bits : {0x7f800001u, 0x7fc00000u, 0xffc00000u, 0x7fffffffu, 0xffffffffu}) {
    EXPECT_NE(refusal_of(std::vector<float>{1, std::bit_cast<float>(bits)}, DType::kF32, 1), "");
  }
  for (const uint16_t bits : {0x7f81, 0xffff, 0x7fff}) {
    EXPECT_NE(refusal_of(std::vector<uint16_t>{1, bits}, DType::kBF16, 1), "");
  }
  for (const uint16_t bits : {0x7c01, 0xffff, 0x7e00}) {
    EXPECT_NE(refusal_of(std::vector<uint16_t>{1, bits}, DType::kF16, 1), "");
  }
}

TEST(FiniteSource, RefusesWhatBfloat16CannotHold) {
  const float first = std::bit_cast<float>(0x7f7f8000u);
  ASSERT_EQ(f32_to_bf16(first), 0x7f80) << "infinity";
  EXPECT_EQ(refusal_of(std::vector<float>{1, 2, first}, DType::kF32, 1), "w[2] = 3.3961775e+38");
}

}  // namespace
}  // namespace rollpack::rollout
