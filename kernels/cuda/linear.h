// Products of rows with a weight, and the rule by which every one of them is summed.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/step_memory.h"

namespace rollpack::kernels::cuda {

inline constexpr int64_t kTileColumns = 64;    // output columns (rows of the weight) of a block
inline constexpr int64_t kSliceMultiple = 16;  // k; a slice is whole products of the tensor core
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

// Rows of a weight in memory: those of gate and up lie in whole groups of 8 each.
ROLLPACK_HOST_DEVICE inline int64_t packed_rows(const DeviceMatrix& weight) {
  return weight.is_gated ? (weight.N + 7) / 8 * 16 : weight.N;
}
// The packed row of row n of a gated weight's gate (part 0) or up (part 1).
ROLLPACK_HOST_DEVICE inline int64_t gated_row(int64_t n, int part) {
  return n / 8 * 16 + n % 8 + part * 8;
}

inline constexpr int kFloatTokens = 16;  // rows of the step that a block takes, f32

// Rows of the step that one block takes. Any gives the same bits.
ROLLPACK_HOST_DEVICE inline int64_t tokens_per_tile(DType dtype, int64_t num_rows) {
  if (dtype != DType::kBF16) return kFloatTokens;
  return num_rows <= 8 ? 8 : num_rows <= 32 ? 32 : 64;
}

ROLLPACK_HOST_DEVICE inline int64_t tiles_of(int64_t count, int64_t tile) {
  return (count + tile - 1) / tile;
}

// Whether every slice has blocks of its own, the last of which adds their partial sums: while there
// are too few blocks without. N counts rows of the weight in memory. The same sums either way.
ROLLPACK_HOST_DEVICE inline bool writes_partials(DType dtype, const SliceRule& slices, int64_t N,
                                                 int64_t num_rows) {
  return slices.count > 1 &&
         tiles_of(N, kTileColumns) * tiles_of(num_rows, tokens_per_tile(dtype, num_rows)) <
             kWantedBlocks;
}

// Partial sums are kept only while tiles are fewer than kWantedBlocks, of 64 tokens at most.
inline constexpr int64_t kPartialsBytes =
    kWantedBlocks * kTileColumns * 64 * kMaxSlices * int64_t{4};
// Behind them, how many slices of a tile are there: int32 [kWantedBlocks], zeros between launches.
inline constexpr int64_t kLinearWorkspaceBytes = kPartialsBytes + kWantedBlocks * int64_t{4};

struct LinearInputs {
  DeviceMatrix weight;
  SliceRule slices;
  Epilogue epilogue = Epilogue::kNone;
  DType dtype = DType::kBF16;
  int64_t num_rows = 0;
  const float* bias = nullptr;  // [N] (gated: gate's, then up's), or null
  const void* in = nullptr;     // [num_rows, K_in] dtype, rows not padded
  void* out = nullptr;          // as in LinearArgs, from the weight's first column on
  int64_t out_stride = 0;       // elements from row to row; N where this rank is alone
  void* workspace = nullptr;    // of kLinearWorkspaceBytes, zeros at first
};

}  // namespace rollpack::kernels::cuda
