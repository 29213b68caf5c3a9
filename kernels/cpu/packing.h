// The packed form of weight matrices: panels of 64 output columns (rows of the checkpoint's
// [N, K_in] matrix), each one contiguous stream in the order the micro-kernels read.
//
//   bf16  [N / 64][K_in / 2][64][2]   an odd K_in gets one zero
//   f32   [N / 64][K_in][64]
//   gated: the 64 columns of panel p are gate columns [32 p, 32 p + 32) and the same up columns
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/kernel_table.h"
#include "kernels/tensor.h"
#include "kernels/weight_source.h"

namespace rollpack::kernels::cpu {

class ThreadPool;

// One packed matrix, not owning.
struct PackedMatrix {
  const std::byte* panels = nullptr;
  DType dtype = DType::kBF16;
  int64_t columns = 0;  // N: output columns held; gated: F, of each of gate and up
  int64_t K_in = 0;
  bool is_gated = false;

  int64_t steps() const { return dtype == DType::kBF16 ? (K_in + 1) / 2 : K_in; }
  int64_t columns_per_panel() const { return is_gated ? 32 : 64; }
  int64_t num_panels() const {
    return (columns + columns_per_panel() - 1) / columns_per_panel();
  }
  int64_t panel_bytes() const { return steps() * 64 * 4; }
  int64_t bytes() const { return num_panels() * panel_bytes(); }
  template <class Element>
  const Element* panel(int64_t index) const {
    return reinterpret_cast<const Element*>(panels + index * panel_bytes());
  }
};

// Where rows of a source go in a packed matrix.
struct PackTarget {
  std::byte* panels = nullptr;
  int64_t first_column = 0;  // plain: packed column of the first row
  int lane_offset = 0;       // gated: 0 for gate, 32 for up
};

// Packs rows [begin, end) of `source` [part_rows, K_in] into `matrix`'s layout at `target`. Values
// are rounded to matrix.dtype once (f16 and bf16 to f32 are exact). Each thread reads the rows of a
// panel and packs them while they are in its L2. pool may be null.
// Errors: those of the source, with some of the columns written.
void pack_rows(const KernelTable& kernels, const WeightSource& source, int64_t begin, int64_t end,
               const PackedMatrix& matrix, const PackTarget& target, ThreadPool* pool);

// Converts elements [begin, end) of a vector to f32, rounded through `compute` first.
void unpack_vector(const WeightSource& source, int64_t begin, int64_t end, DType compute,
                   float* out);

// Copies column `column` of a plain packed matrix, K_in values, as f32: a row of the checkpoint.
void gather_column(const PackedMatrix& matrix, int64_t column, float* out);

}  // namespace rollpack::kernels::cpu
