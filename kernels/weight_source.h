// Where the elements of a weight come from: memory, or a file that is read while they are packed,
// so that no copy of a tensor is ever made.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/tensor.h"

namespace rollpack::kernels {

// The elements of one part of a weight, [rows, cols] of `dtype`, row-major.
class WeightSource {
 public:
  WeightSource(DType dtype, int64_t rows, int64_t cols) : dtype(dtype), rows(rows), cols(cols) {}
  virtual ~WeightSource() = default;

  int64_t num_elements() const { return rows * cols; }
  int64_t row_bytes() const { return cols * dtype_bytes(dtype); }

  // Rows [begin, end), one after the other: where they lie, or in `scratch`, which keeps its size
  // from call to call. Called by several threads at once, each with a scratch of its own.
  // Errors: those of the source, e.g. a file that became shorter.
  virtual const std::byte* read_rows(int64_t begin, int64_t end,
                                     std::vector<std::byte>& scratch) const = 0;

  const DType dtype;
  const int64_t rows;
  const int64_t cols;
};

// A source in memory, which must outlive it.
class TensorSource final : public WeightSource {
 public:
  explicit TensorSource(const ConstTensor& tensor)
      : WeightSource(tensor.dtype, tensor.rows(), tensor.cols()),
        data_(static_cast<const std::byte*>(tensor.data)) {}

  const std::byte* read_rows(int64_t begin, int64_t, std::vector<std::byte>&) const override {
    return data_ + begin * row_bytes();
  }

 private:
  const std::byte* data_;
};

}  // namespace rollpack::kernels
