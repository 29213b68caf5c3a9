#include "kernels/communicator/communicator.h"

#include <vector>

#include "kernels/base/error.h"

namespace rollpack::kernels {

void Communicator::all_gather(std::span<const std::byte> mine, std::span<std::byte> all) {
  const auto bytes = static_cast<int64_t>(mine.size());
  if (static_cast<int64_t>(all.size()) != bytes * size()) {
    fail_invariant("all_gather: room for every rank's bytes");
  }
  std::vector<int64_t> starts;
  for (int64_t rank = 0; rank <= size(); ++rank) starts.push_back(rank * bytes);
  gather_columns({.in = mine.data(),
                  .in_stride = bytes,
                  .out = all.data(),
                  .out_stride = bytes * size(),
                  .rows = 1,
                  .starts = starts});
}

}  // namespace rollpack::kernels
