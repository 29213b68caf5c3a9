// A view of memory with dtype and shape, and the letters that shapes are written in everywhere.
//
//   T tokens (rows) of a step     S sequences of a step      B rows of a padded batch
//   D model width                 H query heads              G KV heads, G divides H
//   K head width                  F feed-forward width       V vocabulary
//   L layers                      P prompt columns           R response columns
#pragma once

#include <array>
#include <cstdint>

#include "kernels/base/dtype.h"

namespace rollpack::kernels {

// Row-major, contiguous, not owning. Unused trailing dimensions are 1.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  std::array<int64_t, 2> shape = {1, 1};

  int64_t rows() const { return shape[0]; }
  int64_t cols() const { return shape[1]; }
  int64_t num_elements() const { return shape[0] * shape[1]; }
  int64_t bytes() const { return num_elements() * dtype_bytes(dtype); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// The same for memory that is only read, such as a tensor of a weight file.
struct ConstTensor {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  std::array<int64_t, 2> shape = {1, 1};

  int64_t rows() const { return shape[0]; }
  int64_t cols() const { return shape[1]; }
  int64_t num_elements() const { return shape[0] * shape[1]; }
  int64_t bytes() const { return num_elements() * dtype_bytes(dtype); }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

}  // namespace rollpack::kernels
