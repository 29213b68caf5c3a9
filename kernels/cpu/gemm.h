// Products of activations with packed weights: one driver over the micro-kernels. Threads claim
// (panel, block of rows) pairs; no sum over k is ever split, so neither threads nor the number of
// rows change a bit.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/packing.h"
#include "kernels/cpu/thread_pool.h"

namespace rollpack::kernels::cpu {

// Input rows as the micro-kernels read them: whole steps, zero-padded where K_in is odd.
template <class Element>
struct InputRows {
  const Element* data = nullptr;
  int64_t stride = 0;
  int64_t rows = 0;
};

// Returns a view of `in`, copied into `scratch` (which keeps its capacity) if its rows do not end
// on a whole step.
template <class Element>
InputRows<Element> whole_steps(const Tensor& in, std::vector<Element>& scratch);

// Sizes of the `count` tiles that cut `rows` into tiles of at most kTileRows, as equal as possible:
// 64 rows are 9 tiles of 6 and 2 of 5, not 10 of 6 and one of 4.
struct RowTiles {
  explicit RowTiles(int64_t rows) : rows(rows), count((rows + kTileRows - 1) / kTileRows) {}
  int64_t begin(int64_t tile) const { return rows * tile / count; }
  int64_t rows;
  int64_t count;
};

// What product `tile` of the num_tiles that read one block of panel columns (of `steps` steps)
// brings into L2 of the block at `next`. The first tile is left alone: what is not there yet it
// streams itself.
PanelPass look_ahead(const void* next, int64_t steps, int64_t tile, int64_t num_tiles, int rows);

struct GemmArgs {
  PackedMatrix weight;
  Epilogue epilogue = Epilogue::kNone;
  const float* bias = nullptr;  // [N], or none
  void* out = nullptr;          // [rows, N] f32, gated: [rows, N] compute dtype
};

template <class Element>
void gemm(const KernelTable& kernels, ThreadPool& pool, const InputRows<Element>& in,
          const GemmArgs& args);

}  // namespace rollpack::kernels::cpu
