#include "kernels/cpu/path_check.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/cpu/float_mode.h"

namespace rollpack::kernels::cpu {
namespace {

// Wrong in ways a machine could be: the even element first; subnormal sums kept.
void even_first(const uint16_t* a, int64_t stride, int rows, const uint16_t* panel, int64_t,
                float* tile, const PanelPass&) {
  for (int i = 0; i < rows * kPanelColumns; ++i) {
    const uint16_t* x = a + i / kPanelColumns * stride;
    const uint16_t* y = panel + i % kPanelColumns * 2;
    const float even = std::fmaf(bf16_to_f32(x[0]), bf16_to_f32(y[0]), tile[i]);
    tile[i] = std::fmaf(bf16_to_f32(x[1]), bf16_to_f32(y[1]), even);
  }
}

void keep_subnormals(const float* a, int64_t stride, int rows, const float* panel, int64_t,
                     float* tile, const PanelPass&) {
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode & ~(kFlushToZero | kDenormalsAreZero));
  for (int i = 0; i < rows * kPanelColumns; ++i) {
    tile[i] = std::fmaf(a[i / kPanelColumns * stride], panel[i % kPanelColumns], tile[i]);
  }
  _mm_setcsr(mode);
}

bool truncate(const float* in, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(in[i]) >> 16);
  }
  return true;
}

KernelTable best() {
  return kernel_table(supported_isas().front());
}

TEST(PathCheck, EveryInstructionSetOfThisMachineAgrees) {
  for (const Isa isa : supported_isas()) {
    EXPECT_TRUE(agrees_with_scalar(kernel_table(isa))) << isa_name(isa);
  }
}

TEST(PathCheck, WrongProductsAndRoundingsAreFound) {
  KernelTable wrong = best();
  wrong.bf16.panel_product = even_first;
  EXPECT_FALSE(agrees_with_scalar(wrong));
  wrong = best();
  wrong.f32.panel_product = keep_subnormals;
  EXPECT_FALSE(agrees_with_scalar(wrong));
  wrong = best();
  wrong.bf16.round_row = truncate;
  EXPECT_FALSE(agrees_with_scalar(wrong));
}

TEST(PathCheck, AWrongPathFallsBackToTheNextRightOneAndIsNamed) {
  KernelTable wrong = best();
  wrong.isa = Isa::kAvx512Bf16;
  wrong.bf16.panel_product = even_first;
  KernelTable wrong_too = wrong;
  wrong_too.isa = Isa::kAvx512;
  const KernelTable& right = kernel_table(supported_isas().front());
  const KernelTable& last = kernel_table(Isa::kPortable);
  const PathChoice first = choose_path(std::vector{&right, &last});
  EXPECT_EQ(first.kernels, &right);
  EXPECT_EQ(first.refused, "");
  const std::vector<const KernelTable*> candidates = {&wrong, &wrong_too, &right, &last};
  const PathChoice third = choose_path(candidates);
  EXPECT_EQ(third.kernels, &right);
  EXPECT_EQ(third.refused, "avx512_bf16, avx512");
}

}  // namespace
}  // namespace rollpack::kernels::cpu
