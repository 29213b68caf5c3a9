// How one request samples: the configuration's defaults, what the request overrides, and the
// model's EOS tokens, joined and checked.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kernels/step_plan.h"
#include "rollout/config/config.h"
#include "trainer_bridge/contract/rollout_service.h"

namespace rollpack::rollout {

struct RequestSampling {
  kernels::SamplingParams params;
  uint64_t seed = 0;
  int32_t response_length = 0;
  int32_t min_tokens = 0;
  std::vector<int32_t> stop_token_ids;  // sorted, unique; EOS among them unless ignored
};

// Overrides win over `defaults`; a stop_token_ids override replaces the configured list, and the
// EOS tokens join either unless ignore_eos. `origin` names the request in errors.
// Errors: invalid_argument naming "sampling.<key>" (or "rollout.<key>" where the default is to
// blame), its value and what is allowed.
RequestSampling resolve_sampling(const RolloutSection& defaults,
                                 const bridge::SamplingOverrides& overrides,
                                 std::span<const int32_t> eos_token_ids, int64_t vocab_size,
                                 const std::string& origin);

}  // namespace rollpack::rollout
