// What ops ask of the tensors that they are given.
#pragma once

#include "kernels/tensor.h"

namespace rollpack::kernels {

// Errors, of both: invalid_argument naming `what`, the tensor's shape and the one expected.
void expect_shape(const Tensor& tensor, int64_t rows, int64_t cols, const char* what);

// Columns [begin, begin + cols) of a tensor: all of it where this rank is alone and begin is 0.
void expect_columns(const Tensor& tensor, int64_t rows, int64_t begin, int64_t cols, bool is_alone,
                    const char* what);

}  // namespace rollpack::kernels
