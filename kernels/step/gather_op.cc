#include "kernels/step/gather_op.h"

#include <vector>

#include "kernels/base/error.h"

namespace rollpack::kernels {

void gather_tensor(Communicator& ranks, const GatherColumnsOpArgs& args) {
  const int64_t element = dtype_bytes(args.tensor.dtype);
  const int64_t stride = args.tensor.cols() * element;
  std::vector<int64_t> starts;
  for (const int64_t start : args.starts) starts.push_back(start * element);
  const auto rank = static_cast<size_t>(ranks.rank());
  if (starts.size() <= rank || starts.back() != stride) {
    fail_invariant("gather_columns: starts cover the tensor's columns");
  }
  ranks.gather_columns({.in = args.tensor.as<std::byte>() + starts[rank],
                        .in_stride = stride,
                        .out = args.tensor.data,
                        .out_stride = stride,
                        .rows = args.tensor.rows(),
                        .starts = starts});
}

}  // namespace rollpack::kernels
