// Rows of activations as products read them, and how they are cut into register tiles.
#pragma once

#include <cstdint>

#include "kernels/cpu/kernel_table.h"

namespace rollpack::kernels::cpu {

// Input rows as the micro-kernels read them: whole steps, zero-padded where K_in is odd.
template <class Element>
struct InputRows {
  const Element* data = nullptr;
  int64_t stride = 0;
  int64_t rows = 0;
};

// Sizes of the `count` tiles that cut `rows` into tiles of at most `tile_rows`, as equal as
// possible: 64 rows are 9 tiles of 6 and 2 of 5, not 10 of 6 and one of 4.
struct RowTiles {
  explicit RowTiles(int64_t rows, int64_t tile_rows = kTileRows)
      : rows(rows), count((rows + tile_rows - 1) / tile_rows) {}
  int64_t begin(int64_t tile) const { return rows * tile / count; }
  int64_t rows;
  int64_t count;
};

}  // namespace rollpack::kernels::cpu
