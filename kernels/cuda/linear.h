// Products of rows with a weight, and the rule by which every one of them is summed.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/step_memory.h"

namespace rollpack::kernels::cuda {

inline constexpr int64_t kTileColumns = 64;    // output columns (rows of the weight) of a block
inline constexpr int64_t kSliceMultiple = 64;  // k; a slice is whole tiles of k
inline constexpr int64_t kWantedBlocks = 128;  // about the multiprocessors of a large device
inline constexpr int64_t kMaxSlices = 8;

// How the sum of an output element is split: `count` slices of `length` k each (the last may be
// shorter), each summed from 0 with k ascending, then added in their order.
struct SliceRule {
  int64_t count = 1;
  int64_t length = 0;
};

// The rule of a weight, a function of its full, unsharded size alone: the smallest power of two up
// to 8 that gives kWantedBlocks blocks or more, as long as slices are not empty. N counts rows of
// the weight, both of gate and up.
ROLLPACK_HOST_DEVICE inline SliceRule slice_rule(int64_t N, int64_t K_in) {
  const int64_t tiles = (N + kTileColumns - 1) / kTileColumns;
  int64_t count = 1;
  while (count < kMaxSlices && tiles * count < kWantedBlocks) count *= 2;
  const auto length_of = [K_in](int64_t slices) {
    const int64_t even = (K_in + slices - 1) / slices;
    return (even + kSliceMultiple - 1) / kSliceMultiple * kSliceMultiple;
  };
  while (count > 1 && (count - 1) * length_of(count) >= K_in) count /= 2;
  return {.count = count, .length = length_of(count)};
}

struct LinearInputs {
  DeviceMatrix weight;
  SliceRule slices;
  Epilogue epilogue = Epilogue::kNone;
  DType dtype = DType::kBF16;
  int64_t num_rows = 0;
  const float* bias = nullptr;  // [N] (gated: gate's, then up's), or null
  const void* in = nullptr;     // [num_rows, K_in] dtype, rows not padded
  void* out = nullptr;          // as in LinearArgs
  float* partials = nullptr;    // workspace of linear_workspace_bytes()
};

}  // namespace rollpack::kernels::cuda
