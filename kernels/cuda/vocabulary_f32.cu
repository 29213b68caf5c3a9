// Logits of f32 rows: one fma a k, k ascending from 0, a chain a logit.
#include "kernels/cuda/panel_reduction.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {
namespace {

constexpr int kStepK = 16;
constexpr int kStride = kStepK + 1;  // 32 rows of weights lie in different banks
constexpr int kWarps = kPanelThreads / static_cast<int>(kWarp);
constexpr int kWarpRows = kTileTokens / kWarps;
constexpr int kLaneColumns = kTileVocabulary / static_cast<int>(kWarp);
constexpr int kStepBytes = (kTileVocabulary + kTileTokens) * kStride * 4;
constexpr int kTileBytes = kTileTokens * kTileStride * 4;
constexpr int kSharedBytes = kStepBytes > kTileBytes ? kStepBytes : kTileBytes;

__device__ void copy_rows(const float* source, int64_t stride, int64_t num_rows, int64_t width,
                          int64_t k, int tile_rows, float* target) {
  for (int i = static_cast<int>(threadIdx.x); i < tile_rows * kStepK; i += kPanelThreads) {
    const int row = i / kStepK, column = i % kStepK;
    const bool is_valid = row < num_rows && k + column < width;
    target[row * kStride + column] = is_valid ? source[row * stride + k + column] : 0.0f;
  }
}

__global__ void __launch_bounds__(kPanelThreads) vocabulary_panels_of_f32(HeadWork work) {
  const TilePlace place = tile_place(work);
  auto* const shared = reinterpret_cast<float*>(dynamic_shared());
  const auto warp = static_cast<int>(threadIdx.x / kWarp);
  const auto lane = static_cast<int>(threadIdx.x % kWarp);
  const DeviceMatrix& weight = work.in.weight;
  const int64_t D = weight.K_in;
  const float* const weights =
      static_cast<const float*>(weight.data) + place.first_column * weight.row_stride;
  const float* const rows =
      static_cast<const float*>(work.in.in) + (work.group.first_row + place.first_row) * D;
  float acc[kWarpRows][kLaneColumns];
  ROLLPACK_UNROLL_WHOLLY
  for (int r = 0; r < kWarpRows; ++r) {
    ROLLPACK_UNROLL_WHOLLY
    for (int c = 0; c < kLaneColumns; ++c) acc[r][c] = 0.0f;
  }
  const int used_rows = place.num_rows - warp * kWarpRows;
  for (int64_t k = 0; k < D; k += kStepK) {
    __syncthreads();  // all are done with the step before
    copy_rows(weights, weight.row_stride, weight.N - place.first_column, D, k, kTileVocabulary,
              shared);
    copy_rows(rows, D, place.num_rows, D, k, kTileTokens, shared + kTileVocabulary * kStride);
    __syncthreads();
    const float* const own_rows = shared + (kTileVocabulary + warp * kWarpRows) * kStride;
    const int steps = static_cast<int>(D - k < kStepK ? D - k : kStepK);
    for (int i = 0; i < steps; ++i) {
      float w[kLaneColumns];
      ROLLPACK_UNROLL_WHOLLY
      for (int c = 0; c < kLaneColumns; ++c) w[c] = shared[(c * 32 + lane) * kStride + i];
      ROLLPACK_UNROLL_WHOLLY
      for (int r = 0; r < kWarpRows; ++r) {
        if (r >= used_rows) continue;
        const float x = own_rows[r * kStride + i];
        ROLLPACK_UNROLL_WHOLLY
        for (int c = 0; c < kLaneColumns; ++c) acc[r][c] = fmaf(x, w[c], acc[r][c]);
      }
    }
  }
  __syncthreads();  // the tile takes the place of the rows
  ROLLPACK_UNROLL_WHOLLY
  for (int r = 0; r < kWarpRows; ++r) {
    ROLLPACK_UNROLL_WHOLLY
    for (int c = 0; c < kLaneColumns; ++c) {
      shared[(warp * kWarpRows + r) * kTileStride + c * 32 + lane] = acc[r][c];
    }
  }
  __syncthreads();
  reduce_tile(work, place, shared);
}

}  // namespace

void vocabulary_panels_f32(Stream stream, const HeadWork& work) {
  launch(vocabulary_panels_of_f32,
         {.kernel = "vocabulary_panels_of_f32",
          .grid = tile_grid(work),
          .block = kPanelThreads,
          .shared_bytes = kSharedBytes},
         stream, work);
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
