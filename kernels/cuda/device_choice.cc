#include "kernels/cuda/device_choice.h"

#include <fmt/format.h>

#include "kernels/base/error.h"

namespace rollpack::kernels::cuda {

int choose_device(int rank_on_node, int num_devices) {
  if (num_devices == 1) return 0;
  if (rank_on_node < num_devices) return rank_on_node;
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = "ranks on this machine",
               .value = fmt::format("at least {}", rank_on_node + 1),
               .allowed = fmt::format("{}, one for each CUDA device that is visible", num_devices),
               .message = "start fewer (mpirun --map-by ppr:N:node)"});
}

}  // namespace rollpack::kernels::cuda
