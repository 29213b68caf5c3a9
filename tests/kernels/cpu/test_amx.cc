// Products by AMX: the rule they follow, bit for bit in scalar code, and that nothing beside a row
// changes its bits. Skipped where the processor has none.
#include "kernels/cpu/amx.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/cpu/float_mode.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/path_check.h"
#include "toy_model.h"

namespace rollpack::kernels::cpu {
namespace {

using testing::Numbers;

class Amx : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!amx_is_available()) GTEST_SKIP() << "no AMX here, or none that this process may use";
  }
  const FlushSubnormalsScope flush_;
};

std::vector<uint16_t> random_bf16(Numbers& numbers, int64_t count) {
  std::vector<uint16_t> values;
  for (const float value : numbers.vector(count, 2.0f)) values.push_back(f32_to_bf16(value));
  return values;
}

TEST_F(Amx, FollowsItsRule) {
  EXPECT_TRUE(amx_agrees_with_scalar());
}

TEST_F(Amx, EveryNumberOfRowsAndStepsGivesTheSumsOfTheRule) {
  Numbers numbers(7);
  constexpr int64_t kMaxSteps = 70, kStride = 2 * kMaxSteps + 6;
  const auto rows = random_bf16(numbers, kAmxTileRows * kStride);
  const auto panel = random_bf16(numbers, kMaxSteps * 2 * kPanelColumns);
  std::vector<float> sums(kAmxTileRows * kPanelColumns);
  for (int64_t steps = 1; steps <= kMaxSteps; ++steps) {
    AmxTiles tiles;
    for (int num_rows = 1; num_rows <= kAmxTileRows; ++num_rows) {
      std::fill(sums.begin(), sums.end(), -1.0f);
      tiles.panel_product(rows.data(), kStride, num_rows, panel.data(), steps, sums.data(), {});
      for (int i = 0; i < kAmxTileRows * kPanelColumns; ++i) {
        const int row = i / kPanelColumns, column = i % kPanelColumns;
        const uint16_t* const elements = rows.data() + row * kStride;
        const float want =
            row < num_rows ? amx_sum(elements, panel.data(), column, steps, 0) : -1.0f;
        ASSERT_EQ(std::bit_cast<uint32_t>(sums[static_cast<size_t>(i)]),
                  std::bit_cast<uint32_t>(want))
            << steps << " steps, row " << row << " of " << num_rows << ", column " << column;
      }
    }
  }
}

TEST_F(Amx, ASumGoesOnAtAnySlice) {
  Numbers numbers(8);
  constexpr int64_t kSteps = 5 * kAmxSliceSteps + 3;
  const auto rows = random_bf16(numbers, kAmxTileRows * 2 * kSteps);
  const auto panel = random_bf16(numbers, kSteps * 2 * kPanelColumns);
  std::vector<float> whole(kAmxTileRows * kPanelColumns), parts(whole.size());
  AmxTiles tiles;
  tiles.panel_product(rows.data(), 2 * kSteps, kAmxTileRows, panel.data(), kSteps, whole.data(),
                      {});
  for (int64_t cut = kAmxSliceSteps; cut < kSteps; cut += kAmxSliceSteps) {
    tiles.panel_product(rows.data(), 2 * kSteps, kAmxTileRows, panel.data(), cut, parts.data(), {});
    tiles.panel_product(rows.data() + 2 * cut, 2 * kSteps, kAmxTileRows,
                        panel.data() + cut * 2 * kPanelColumns, kSteps - cut, parts.data(),
                        {.continues = true});
    ASSERT_EQ(parts, whole) << "cut at " << cut;
  }
}

// The bound of a sum of K products in f32 in any order: gamma(K) sum |a b|, Higham (2002), 3.1.
TEST_F(Amx, ProductsStayWithinTheRoundingOfTheirSums) {
  Numbers numbers(9);
  constexpr double kUnit = 0x1p-24;
  for (const int64_t K : {34, 160, 898}) {
    const auto row = random_bf16(numbers, K);
    const auto panel = random_bf16(numbers, K / 2 * 2 * kPanelColumns);
    std::vector<float> sums(kPanelColumns);
    AmxTiles().panel_product(row.data(), K, 1, panel.data(), K / 2, sums.data(), {});
    for (int64_t n = 0; n < kPanelColumns; ++n) {
      double exact = 0, size = 0;
      for (int64_t k = 0; k < K; ++k) {
        const auto at = static_cast<size_t>((k / 2 * kPanelColumns + n) * 2 + k % 2);
        const double product = static_cast<double>(bf16_to_f32(row[static_cast<size_t>(k)])) *
                               static_cast<double>(bf16_to_f32(panel[at]));
        exact += product;
        size += std::abs(product);
      }
      const double bound = static_cast<double>(K) * kUnit * 1.01 * size;
      ASSERT_NEAR(static_cast<double>(sums[static_cast<size_t>(n)]), exact, bound) << "K " << K;
    }
  }
}

// One item or several, one block of k or several, one thread or three.
TEST_F(Amx, ARowHasTheSameBitsBesideAnyOthers) {
  Numbers numbers(10);
  for (const int64_t K : {34, 450, 2050}) {
    constexpr int64_t kColumns = 200, kMaxRows = 300;
    const auto rows = random_bf16(numbers, kMaxRows * K);
    const PackedMatrix shape{.columns = kColumns, .K_in = K};
    auto panels = random_bf16(numbers, shape.bytes() / 2);
    const PackedMatrix weight{.panels = reinterpret_cast<const std::byte*>(panels.data()),
                              .columns = kColumns,
                              .K_in = K};
    const auto multiply = [&](int64_t first, int64_t count, int num_threads) {
      ThreadPool pool(num_threads);
      PanelProducts<uint16_t> products(kernel_table(Isa::kPortable), num_threads, PairPath::kAmx);
      std::vector<float> out(static_cast<size_t>(count * kColumns));
      gemm<uint16_t>(kernel_table(Isa::kPortable), pool, products,
                     {rows.data() + first * K, K, count},
                     {.weight = weight, .out = out.data(), .out_stride = kColumns});
      return out;
    };
    const std::vector<float> all = multiply(0, kMaxRows, 3);
    for (const int64_t count : {1, 2, 15, 16, 17, 33, 64, 100, 257}) {
      const int64_t first = (kMaxRows - count) / 2;
      const std::vector<float> some = multiply(first, count, 1 + static_cast<int>(count % 3));
      ASSERT_TRUE(std::equal(some.begin(), some.end(), all.begin() + first * kColumns))
          << "K " << K << ", " << count << " rows";
    }
  }
}

}  // namespace
}  // namespace rollpack::kernels::cpu
