#include "rollout/batching/batching_policy.h"

#include "kernels/base/error.h"
#include "rollout/batching/continuous.h"
#include "rollout/batching/left_padded.h"
#include "rollout/batching/prepacked.h"

namespace rollpack::rollout {

std::unique_ptr<BatchingPolicy> make_batching_policy(std::string_view name) {
  if (name == "continuous") return std::make_unique<ContinuousBatching>();
  if (name == "prepacked") return std::make_unique<PrepackedBatching>();
  using Order = LeftPaddedBatching::Order;
  if (name == "left_padded") return std::make_unique<LeftPaddedBatching>(Order::kArrival);
  if (name == "length_sorted") return std::make_unique<LeftPaddedBatching>(Order::kLength);
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = "engine.batching",
               .value = std::string(name),
               .allowed = "continuous, prepacked, left_padded or length_sorted"});
}

}  // namespace rollpack::rollout
