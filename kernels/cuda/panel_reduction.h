// A tile of logits in shared memory, reduced to the statistics of its panels: the end of both
// kernels that multiply, that of bf16 and that of f32. Included by .cu files.
#pragma once

#include "kernels/cuda/head_kernels.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {

inline constexpr int kTileTokens = 64;       // head rows of a block
inline constexpr int kTileVocabulary = 128;  // columns of a block: two panels
inline constexpr int kTilePanels = kTileVocabulary / kPanelColumns;
inline constexpr int kTileStride = kTileVocabulary + 4;  // f32 from row to row of a tile
inline constexpr int kPanelThreads = 128;

// The block's rows of the group and first column of the vocabulary.
struct TilePlace {
  int32_t first_row;
  int32_t num_rows;
  int64_t first_column;
};

// Tiles of rows follow each other, so that a weight is read from memory once.
__device__ __forceinline__ TilePlace tile_place(const HeadWork& work) {
  const int32_t row_tiles = (work.group.num_rows + kTileTokens - 1) / kTileTokens;
  const auto block = static_cast<int32_t>(blockIdx.x);
  const int32_t first = block % row_tiles * kTileTokens, left = work.group.num_rows - first;
  return {first, left < kTileTokens ? left : kTileTokens,
          static_cast<int64_t>(block / row_tiles) * kTileVocabulary};
}

inline GridShape tile_grid(const HeadWork& work) {
  const int64_t row_tiles = (work.group.num_rows + kTileTokens - 1) / kTileTokens;
  const int64_t columns = (work.held_columns() + kTileVocabulary - 1) / kTileVocabulary;
  return {.x = static_cast<uint32_t>(row_tiles * columns)};
}

// A warp: two logits a lane, columns lane and lane + 32 of a panel; those past `columns` are not
// there. Order of the sums: a lane's two, then lanes by halves.
__device__ __forceinline__ PanelStats panel_stats(float first, float second, int columns,
                                                  float scale) {
  const auto lane = static_cast<int>(threadIdx.x % kWarp);
  const bool has_first = lane < columns, has_second = lane + 32 < columns;
  const float x0 = has_first ? first * scale : -infinity_f32();
  const float x1 = has_second ? second * scale : -infinity_f32();
  const bool is_bad = (has_first && !is_finite(x0)) || (has_second && !is_finite(x1));
  const bool is_panel_finite = __ballot_sync(kAllLanes, is_bad) == 0;
  const float max = warp_max(fmaxf(x0, x1));
  const float e0 = exp_f32(x0 - max), e1 = exp_f32(x1 - max);
  const float sum = warp_sum(e0 + e1);
  // Of a column that is not there x - max is -infinity and e is 0: their product counts as 0.
  const float w0 = has_first ? (x0 - max) * e0 : 0.0f, w1 = has_second ? (x1 - max) * e1 : 0.0f;
  return {max, sum, warp_sum(w0 + w1), is_panel_finite ? 1 : 0};
}

// tile [kTileTokens][kTileStride]: logits of the block's rows and columns, all written.
__device__ __forceinline__ void reduce_tile(const HeadWork& work, const TilePlace& place,
                                            const float* tile) {
  const HeadMemory& memory = work.memory;
  const auto lane = static_cast<int>(threadIdx.x % kWarp);
  for (int r = static_cast<int>(threadIdx.x / kWarp); r < place.num_rows;
       r += kPanelThreads / static_cast<int>(kWarp)) {
    const int32_t row = place.first_row + r;
    const int32_t begin = memory.row_begin[row], end = memory.row_begin[row + 1];
    if (memory.queries[begin].is_skipped != 0) continue;
    for (int p = 0; p < kTilePanels; ++p) {
      const int64_t first = place.first_column + p * kPanelColumns;
      if (first >= work.held_columns()) break;
      const int64_t panel = first / kPanelColumns, left = work.held_columns() - first;
      const int64_t first_token = work.in.part.held.begin + first;
      const int columns = static_cast<int>(left < kPanelColumns ? left : kPanelColumns);
      const float x0 = tile[r * kTileStride + p * kPanelColumns + lane];
      const float x1 = tile[r * kTileStride + p * kPanelColumns + lane + 32];
      if (memory.keeps_logits[row] != 0) {
        float* const kept = memory.logits + row * memory.logits_stride() + first_token;
        kept[lane] = x0;
        kept[lane + 32] = x1;
      }
      const PanelStats unit = panel_stats(x0, x1, columns, 1.0f);
      if (lane == 0) memory.panels[row * memory.held_panels + panel] = unit;
      for (int32_t base = begin; base < end; base += static_cast<int32_t>(kWarp)) {
        const int32_t q = base + lane;
        bool has_own = false;
        if (q < end) {
          const HeadQuery& query = memory.queries[q];
          has_own = query.distribution == work.own_distribution(q);
          const int64_t column = query.token - first_token;
          if (query.slot < 0 && column >= 0 && column < columns) {
            memory.choices[q] = {query.token, tile[r * kTileStride + p * kPanelColumns + column]};
          }
        }
        for (unsigned left_queries = __ballot_sync(kAllLanes, has_own); left_queries != 0;
             left_queries &= left_queries - 1) {
          const int32_t owner = base + __ffs(static_cast<int>(left_queries)) - 1;
          const PanelStats scaled = panel_stats(x0, x1, columns, memory.queries[owner].scale);
          if (lane == 0) {
            memory.panels[work.own_distribution(owner) * memory.held_panels + panel] = scaled;
          }
        }
      }
    }
  }
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
