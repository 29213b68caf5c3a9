// Elements of a checkpoint as the device holds them: converted to f32, rounded once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/weight_source.h"

namespace rollpack::kernels::cuda {

// Elements of a float dtype as f32, exact.
void read_f32(const std::byte* elements, DType dtype, std::span<float> out);

// `count` rows of source.cols elements, close together, into rows of row_stride elements of
// `compute` (kBF16 or kF32), zeros behind each.
void round_rows(const std::byte* rows, const WeightSource& source, int64_t count,
                int64_t row_stride, DType compute, std::byte* out);

}  // namespace rollpack::kernels::cuda
