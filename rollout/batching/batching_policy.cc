#include "rollout/batching/batching_policy.h"

#include "kernels/base/error.h"
#include "rollout/batching/continuous.h"
#include "rollout/batching/left_padded.h"

namespace rollpack::rollout {

std::unique_ptr<BatchingPolicy> make_batching_policy(std::string_view name) {
  if (name == "continuous") return std::make_unique<ContinuousBatching>();
  if (name == "left_padded") return std::make_unique<LeftPaddedBatching>();
  throw Error({.code = ErrorCode::kUnsupported,
               .field = "engine.batching",
               .value = std::string(name),
               .allowed = "continuous or left_padded"});
}

}  // namespace rollpack::rollout
