// Products of bf16 by Intel's AMX: tiles of rows times a panel, several times as fast as vectors
// from a few rows on. Its instruction sums in an order of its own, so these are other bits than
// those of kernel_table.h; they too depend on nothing but the row and the panel.
//
// The rule: k goes in slices of 16 pairs. Of a slice the even elements' products are summed in a
// chain of FMAs from 0, the odd ones' in another; sum += even + odd. Zeros fill the last slice up.
// Subnormals count as zeros, in and out. Source: Intel SDM, TDPBF16PS.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/kernel_table.h"

namespace rollpack::kernels::cpu {

inline constexpr int kAmxTileRows = 16;  // of a tile of the processor's
inline constexpr int64_t kAmxSliceSteps = 16;

// Whether this processor has it and the system lets this process use it. It asks for that.
bool amx_is_available();

// The rule in scalar code: what `steps` pairs of row `a` and of column `column` of a panel add to
// `sum`. The thread flushes subnormals (float_mode.h).
float amx_sum(const uint16_t* a, const uint16_t* panel, int column, int64_t steps, float sum);

// The processor's tiles, set up for this thread until the end of the scope. No other scope of the
// thread may lie inside.
class AmxTiles {
 public:
  AmxTiles() = default;
  ~AmxTiles();
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  // As ElementKernels::panel_product, for up to kAmxTileRows rows. A product that continues starts
  // at a multiple of kAmxSliceSteps.
  void panel_product(const uint16_t* a, int64_t a_stride, int rows, const uint16_t* panel,
                     int64_t steps, float* tile, const PanelPass& pass);

 private:
  int rows_ = 0;  // that the tiles are set up for; 0: not yet
};

}  // namespace rollpack::kernels::cpu
