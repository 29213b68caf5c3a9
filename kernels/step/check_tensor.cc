#include "kernels/step/check_tensor.h"

#include <fmt/format.h>

#include "kernels/base/error.h"

namespace rollpack::kernels {

void expect_shape(const Tensor& tensor, int64_t rows, int64_t cols, const char* what) {
  if (tensor.rows() == rows && tensor.cols() == cols) return;
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = what,
               .value = fmt::format("[{}, {}]", tensor.rows(), tensor.cols()),
               .allowed = fmt::format("[{}, {}]", rows, cols)});
}

void expect_columns(const Tensor& tensor, int64_t rows, int64_t begin, int64_t cols, bool is_alone,
                    const char* what) {
  if (is_alone && begin == 0) return expect_shape(tensor, rows, cols, what);
  if (tensor.rows() == rows && begin >= 0 && begin + cols <= tensor.cols()) return;
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = what,
               .value = fmt::format("[{}, {}] from column {}", tensor.rows(), tensor.cols(), begin),
               .allowed = fmt::format("[{}, {}] or wider", rows, cols)});
}

}  // namespace rollpack::kernels
