#include "kernels/cpu/packing.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/cpu/float_mode.h"
#include "kernels/cpu/thread_pool.h"

namespace rollpack::kernels::cpu {
namespace {

constexpr int kLanes = 16;  // rows that pack_columns takes at a time

// Elements of k converted at a time where the source has another dtype: 16 rows of 256 f32 are
// 16 KiB, a third of the smallest L1.
constexpr int64_t kBlock = 256;

uint16_t load_half(const std::byte* at) {
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return bits;
}

void load_f32(const std::byte* source, DType dtype, int64_t count, float* out) {
  switch (dtype) {
    case DType::kF32:
      std::memcpy(out, source, static_cast<size_t>(count) * sizeof(float));
      return;
    case DType::kBF16:
      for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_f32(load_half(source + i * 2));
      return;
    case DType::kF16:
      for (int64_t i = 0; i < count; ++i) out[i] = f16_to_f32(load_half(source + i * 2));
      return;
    default: fail_invariant("a weight's dtype is checked before it is packed");
  }
}

// Elements rounded to a panel's dtype.
template <class Element>
void load_rounded(const KernelTable& kernels, const std::byte* source, DType dtype, int64_t count,
                  Element* out) {
  if constexpr (sizeof(Element) == sizeof(float)) {
    load_f32(source, dtype, count, out);
  } else {
    float block[kBlock];
    load_f32(source, dtype, count, block);
    kernels.bf16.round_row(block, count, out);  // what is not finite is found when it is used
  }
}

// `count` <= 16 rows of n elements, one after the other, into columns of the panel at `out`.
template <class Element>
void pack_lanes(const KernelTable& kernels, const std::byte* rows, DType dtype, int count,
                int64_t n, Element* out) {
  constexpr DType kDType = sizeof(Element) == 2 ? DType::kBF16 : DType::kF32;
  const ElementKernels<Element>& of = kernels.of<Element>();
  const int64_t row_bytes = n * dtype_bytes(dtype);
  if (dtype == kDType) return of.pack_columns(rows, row_bytes, count, n, out);
  alignas(64) Element block[kLanes * kBlock];
  for (int64_t k = 0; k < n; k += kBlock) {
    const int64_t width = std::min(kBlock, n - k);
    for (int r = 0; r < count; ++r) {
      load_rounded(kernels, rows + r * row_bytes + k * dtype_bytes(dtype), dtype, width,
                   block + r * kBlock);
    }
    of.pack_columns(reinterpret_cast<const std::byte*>(block), kBlock * sizeof(Element), count,
                    width, out + k * kPanelColumns);
  }
}

template <class Element>
void pack_panels(const KernelTable& kernels, const WeightSource& source, int64_t begin, int64_t end,
                 const PackedMatrix& matrix, const PackTarget& target, ThreadPool* pool) {
  const int64_t per_panel = matrix.columns_per_panel();
  const int64_t end_column = target.first_column + end - begin;
  const int64_t first_panel = target.first_column / per_panel;
  const int64_t num_panels = (end_column - 1) / per_panel - first_panel + 1;
  std::vector<std::vector<std::byte>> scratch(
      static_cast<size_t>(pool == nullptr ? 1 : pool->num_threads()));
  const auto pack_panel = [&](int64_t index, int thread) {
    const FlushSubnormalsScope mode;  // for rounding; the thread may not be of the pool
    const int64_t panel = first_panel + index;
    const int64_t low = std::max(panel * per_panel, target.first_column);
    const int64_t high = std::min((panel + 1) * per_panel, end_column);
    const int64_t first_row = begin + low - target.first_column;
    const std::byte* rows =
        source.read_rows(first_row, first_row + high - low, scratch[static_cast<size_t>(thread)]);
    auto* out = reinterpret_cast<Element*>(target.panels + panel * matrix.panel_bytes());
    for (int64_t column = low; column < high; column += kLanes) {
      const int64_t lane = target.lane_offset + column - panel * per_panel;
      const auto count = static_cast<int>(std::min<int64_t>(kLanes, high - column));
      pack_lanes(kernels, rows + (column - low) * source.row_bytes(), source.dtype, count,
                 matrix.K_in, out + lane * (4 / sizeof(Element)));
    }
  };
  if (pool != nullptr) {
    pool->parallel_for(num_panels, pack_panel);
  } else {
    for (int64_t i = 0; i < num_panels; ++i) pack_panel(i, 0);
  }
}

}  // namespace

void pack_rows(const KernelTable& kernels, const WeightSource& source, int64_t begin, int64_t end,
               const PackedMatrix& matrix, const PackTarget& target, ThreadPool* pool) {
  if (begin >= end) return;
  if (matrix.dtype == DType::kF32) {
    pack_panels<float>(kernels, source, begin, end, matrix, target, pool);
  } else {
    pack_panels<uint16_t>(kernels, source, begin, end, matrix, target, pool);
  }
}

void unpack_vector(const WeightSource& source, int64_t begin, int64_t end, DType compute,
                   float* out) {
  std::vector<std::byte> scratch;
  const std::byte* all = source.read_rows(0, source.rows, scratch);
  load_f32(all + begin * dtype_bytes(source.dtype), source.dtype, end - begin, out);
  if (compute == DType::kBF16) {
    for (int64_t i = 0; i < end - begin; ++i) out[i] = bf16_to_f32(f32_to_bf16(out[i]));
  }
}

void gather_column(const PackedMatrix& matrix, int64_t column, float* out) {
  const int64_t lane = column % 64;
  if (matrix.dtype == DType::kF32) {
    const float* in = matrix.panel<float>(column / 64) + lane;
    for (int64_t k = 0; k < matrix.K_in; ++k) out[k] = in[k * 64];
    return;
  }
  const uint16_t* in = matrix.panel<uint16_t>(column / 64) + lane * 2;
  for (int64_t k = 0; k < matrix.K_in; ++k) out[k] = bf16_to_f32(in[(k / 2) * 128 + k % 2]);
}

}  // namespace rollpack::kernels::cpu
