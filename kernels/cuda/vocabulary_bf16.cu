// Logits of bf16 rows with mma.sync m16n8k16: the vocabulary on the MMA's M side, rows on N, so
// that one row or 64 take the same instruction. A logit is one chain of mma steps of 16, k
// ascending from 0, whatever the other rows; panel_logits() in sampling.cu repeats it for a single
// row.
#include "kernels/cuda/panel_reduction.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {
namespace {

constexpr int kStepK = 64;  // elements of k that are copied at a time
constexpr int kStages = 3;
constexpr int kStride = kStepK + 8;  // eight rows of ldmatrix lie in different banks
constexpr int kStageElements = (kTileVocabulary + kTileTokens) * kStride;
constexpr int kSharedBytes = kStages * kStageElements * 2;
static_assert(kTileTokens * kTileStride * 4 <= kSharedBytes);

// Starts to copy rows of 64 elements from column k on; zeros past num_rows and past width.
__device__ void copy_rows(const uint16_t* source, int64_t stride, int64_t num_rows, int64_t width,
                          int64_t k, int tile_rows, uint16_t* target) {
  constexpr int kParts = kStepK / 8;
  for (int i = static_cast<int>(threadIdx.x); i < tile_rows * kParts; i += kPanelThreads) {
    const int row = i / kParts, part = i % kParts;
    const int64_t column = k + part * 8;
    const bool is_valid = row < num_rows && column < width;
    cp_async_16(target + row * kStride + part * 8,
                is_valid ? source + row * stride + column : source, is_valid);
  }
}

// The same without asynchronous copies, for rows that are not aligned to 16 bytes.
__device__ void copy_unaligned_rows(const uint16_t* source, int64_t stride, int64_t num_rows,
                                    int64_t width, int64_t k, int tile_rows, uint16_t* target) {
  for (int i = static_cast<int>(threadIdx.x); i < tile_rows * kStepK; i += kPanelThreads) {
    const int row = i / kStepK, column = i % kStepK;
    const bool is_valid = row < num_rows && k + column < width;
    target[row * kStride + column] = is_valid ? source[row * stride + k + column] : uint16_t{0};
  }
}

__device__ void copy_step(const HeadWork& work, const TilePlace& place, int64_t k,
                          uint16_t* stage) {
  const DeviceMatrix& weight = work.in.weight;
  copy_rows(static_cast<const uint16_t*>(weight.data) + place.first_column * weight.row_stride,
            weight.row_stride, weight.N - place.first_column, weight.row_stride, k, kTileVocabulary,
            stage);
  const int64_t D = weight.K_in;
  const uint16_t* const rows =
      static_cast<const uint16_t*>(work.in.in) + (work.group.first_row + place.first_row) * D;
  uint16_t* const target = stage + kTileVocabulary * kStride;
  if (D % 8 == 0) {
    copy_rows(rows, D, place.num_rows, D, k, kTileTokens, target);
  } else {
    copy_unaligned_rows(rows, D, place.num_rows, D, k, kTileTokens, target);
  }
}

constexpr int kVocabularyTiles = 4;  // of 16 columns of the vocabulary, a warp
constexpr int kTokenTiles = 4;       // of 8 rows, a warp

// acc += weights [64 of this warp] x rows [32 of this warp] over one stage.
__device__ __forceinline__ void multiply_step(const uint16_t* stage, int warp, int lane,
                                              int token_tiles,
                                              float (&acc)[kVocabularyTiles][kTokenTiles][4]) {
  const uint16_t* const weights = stage + warp % 2 * 64 * kStride;
  const uint16_t* const rows = stage + (kTileVocabulary + warp / 2 * 32) * kStride;
  ROLLPACK_UNROLL_WHOLLY
  for (int k = 0; k < kStepK; k += 16) {
    uint32_t b[kTokenTiles][2];
    ROLLPACK_UNROLL_WHOLLY
    for (int n = 0; n < kTokenTiles; n += 2) {
      if (n >= token_tiles) continue;
      // Matrices: rows 0-7 of k 0-7 and 8-15, then rows 8-15 of both.
      uint32_t r[4];
      const int row = n * 8 + lane % 8 + lane / 16 * 8;
      ldmatrix_x4(r, rows + row * kStride + k + lane / 8 % 2 * 8);
      b[n][0] = r[0];
      b[n][1] = r[1];
      b[n + 1][0] = r[2];
      b[n + 1][1] = r[3];
    }
    ROLLPACK_UNROLL_WHOLLY
    for (int m = 0; m < kVocabularyTiles; ++m) {
      uint32_t a[4];
      ldmatrix_x4(a, weights + (m * 16 + lane % 16) * kStride + k + lane / 16 * 8);
      ROLLPACK_UNROLL_WHOLLY
      for (int n = 0; n < kTokenTiles; ++n) {
        if (n < token_tiles) mma_bf16_m16n8k16(acc[m][n], a, b[n]);
      }
    }
  }
}

__global__ void __launch_bounds__(kPanelThreads, 2) vocabulary_panels(HeadWork work) {
  const TilePlace place = tile_place(work);
  auto* const stages = reinterpret_cast<uint16_t*>(dynamic_shared());
  const auto warp = static_cast<int>(threadIdx.x / kWarp);
  const auto lane = static_cast<int>(threadIdx.x % kWarp);
  const int token_tiles = (place.num_rows - warp / 2 * 32 + 7) / 8;  // none: 0 or less
  const int64_t num_steps = (work.in.weight.K_in + kStepK - 1) / kStepK;
  float acc[kVocabularyTiles][kTokenTiles][4];
  ROLLPACK_UNROLL_WHOLLY
  for (int m = 0; m < kVocabularyTiles; ++m) {
    ROLLPACK_UNROLL_WHOLLY
    for (int n = 0; n < kTokenTiles; ++n) {
      ROLLPACK_UNROLL_WHOLLY
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;
    }
  }
  for (int64_t step = 0; step < kStages - 1; ++step) {
    if (step < num_steps) copy_step(work, place, step * kStepK, stages + step * kStageElements);
    cp_async_commit();
  }
  for (int64_t step = 0; step < num_steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step is there for all, and all are done with the one before
    const int64_t ahead = step + kStages - 1;
    if (ahead < num_steps) {
      copy_step(work, place, ahead * kStepK, stages + ahead % kStages * kStageElements);
    }
    cp_async_commit();
    if (token_tiles > 0) {
      multiply_step(stages + step % kStages * kStageElements, warp, lane, token_tiles, acc);
    }
  }
  __syncthreads();  // the tile takes the place of the stages
  auto* const tile = reinterpret_cast<float*>(stages);
  ROLLPACK_UNROLL_WHOLLY
  for (int m = 0; m < kVocabularyTiles; ++m) {
    ROLLPACK_UNROLL_WHOLLY
    for (int n = 0; n < kTokenTiles; ++n) {
      ROLLPACK_UNROLL_WHOLLY
      for (int i = 0; i < 4; ++i) {
        const int column = warp % 2 * 64 + m * 16 + lane / 4 + i / 2 * 8;
        const int row = warp / 2 * 32 + n * 8 + lane % 4 * 2 + i % 2;
        tile[row * kTileStride + column] = acc[m][n][i];
      }
    }
  }
  __syncthreads();
  reduce_tile(work, place, tile);
}

}  // namespace

void vocabulary_panels_bf16(Stream stream, const HeadWork& work) {
  launch(vocabulary_panels,
         {.kernel = "vocabulary_panels",
          .grid = tile_grid(work),
          .block = kPanelThreads,
          .shared_bytes = kSharedBytes},
         stream, work);
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
