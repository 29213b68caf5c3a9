#include "kernels/cpu/packing.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/error.h"
#include "kernels/cpu/thread_pool.h"

namespace rollpack::kernels::cpu {
namespace {

// Elements of k converted at a time: 64 rows x 64 elements of bf16 are 8 KiB of packed panel, which
// stays in L1 while its 64 columns are filled one after the other.
constexpr int64_t kBlock = 64;

void load_f32(const ConstTensor& source, int64_t first, int64_t count, float* out) {
  switch (source.dtype) {
    case DType::kF32:
      std::memcpy(out, source.as<float>() + first, static_cast<size_t>(count) * sizeof(float));
      return;
    case DType::kBF16:
      for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_f32(source.as<uint16_t>()[first + i]);
      return;
    case DType::kF16:
      for (int64_t i = 0; i < count; ++i) out[i] = f16_to_f32(source.as<uint16_t>()[first + i]);
      return;
    default: fail_invariant("a weight's dtype is checked before it is packed");
  }
}

// One row's elements [k, k + count) into its lane of a panel.
void pack_block(const ConstTensor& source, int64_t row, int64_t k, int64_t count, DType dtype,
                std::byte* panel, int lane) {
  float block[kBlock];
  load_f32(source, row * source.cols() + k, count, block);
  if (dtype == DType::kF32) {
    auto* out = reinterpret_cast<float*>(panel) + k * 64 + lane;
    for (int64_t i = 0; i < count; ++i) out[i * 64] = block[i];
    return;
  }
  auto* out = reinterpret_cast<uint16_t*>(panel) + (k / 2) * 128 + lane * 2;
  for (int64_t i = 0; i < count; ++i) out[(i / 2) * 128 + i % 2] = f32_to_bf16(block[i]);
}

}  // namespace

void pack_rows(const ConstTensor& source, int64_t begin, int64_t end, const PackedMatrix& matrix,
               const PackTarget& target, ThreadPool* pool) {
  if (begin >= end) return;
  const int64_t per_panel = matrix.columns_per_panel();
  const int64_t first_panel = target.first_column / per_panel;
  const int64_t last_panel = (target.first_column + end - begin - 1) / per_panel;
  const auto pack_panel = [&](int64_t index, int) {
    const int64_t panel = first_panel + index;
    const int64_t low = std::max(panel * per_panel, target.first_column);
    const int64_t high = std::min((panel + 1) * per_panel, target.first_column + end - begin);
    std::byte* out = target.panels + panel * matrix.panel_bytes();
    for (int64_t k = 0; k < matrix.K_in; k += kBlock) {
      const int64_t count = std::min(kBlock, matrix.K_in - k);
      for (int64_t column = low; column < high; ++column) {
        const int lane = target.lane_offset + static_cast<int>(column - panel * per_panel);
        pack_block(source, begin + column - target.first_column, k, count, matrix.dtype, out,
                   lane);
      }
    }
  };
  const int64_t num_panels = last_panel - first_panel + 1;
  if (pool != nullptr) {
    pool->parallel_for(num_panels, pack_panel);
  } else {
    for (int64_t i = 0; i < num_panels; ++i) pack_panel(i, 0);
  }
}

void unpack_vector(const ConstTensor& source, int64_t first, int64_t count, DType compute,
                   float* out) {
  load_f32(source, first, count, out);
  if (compute == DType::kBF16) {
    for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_f32(f32_to_bf16(out[i]));
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
