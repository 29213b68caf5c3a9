#include "kernels/cuda/rounded_rows.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace rollpack::kernels::cuda {

void read_f32(const std::byte* elements, DType dtype, std::span<float> out) {
  if (dtype == DType::kF32) {
    std::memcpy(out.data(), elements, out.size_bytes());
    return;
  }
  for (size_t i = 0; i < out.size(); ++i) {
    uint16_t bits;
    std::memcpy(&bits, elements + i * 2, 2);
    out[i] = dtype == DType::kBF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
  }
}

void round_rows(const std::byte* rows, const WeightSource& source, int64_t count,
                int64_t row_stride, DType compute, std::byte* out) {
  const int64_t out_bytes = row_stride * dtype_bytes(compute);
  std::vector<float> values(static_cast<size_t>(source.cols));
  for (int64_t row = 0; row < count; ++row) {
    const std::byte* const in = rows + row * source.row_bytes();
    std::byte* const target = out + row * out_bytes;
    const int64_t used = source.cols * dtype_bytes(compute);
    if (source.dtype == compute && compute == DType::kF32) {
      std::memcpy(target, in, static_cast<size_t>(used));
    } else {
      read_f32(in, source.dtype, values);
      if (compute == DType::kF32) {
        std::memcpy(target, values.data(), static_cast<size_t>(used));
      } else {
        for (int64_t k = 0; k < source.cols; ++k) {
          // Of bf16 too: subnormals are flushed on every way.
          const uint16_t bits = f32_to_bf16(values[static_cast<size_t>(k)]);
          std::memcpy(target + k * 2, &bits, 2);
        }
      }
    }
    std::memset(target + used, 0, static_cast<size_t>(out_bytes - used));
  }
}

}  // namespace rollpack::kernels::cuda
