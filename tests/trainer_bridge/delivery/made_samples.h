// Samples and failures that the tests of delivery commit.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "trainer_bridge/contract/sample.h"

namespace rollpack::bridge::testing {

inline constexpr uint64_t kAnna = 1, kBerta = 2;  // clients

inline SampleKey key_of(int64_t request, int32_t prompt, int32_t index, int32_t group) {
  return {request, prompt, {std::to_string(prompt), true}, index, group};
}

// Three prompt tokens and `tokens` response tokens, drawn from weight version `version`.
inline Sample sample_of(int64_t request, int32_t prompt, int32_t index, int32_t group,
                        int32_t tokens, int64_t version = 0) {
  Sample sample{.key = key_of(request, prompt, index, group)};
  sample.prompt_ids = std::make_shared<const std::vector<int32_t>>(std::vector<int32_t>{1, 2, 3});
  for (int32_t i = 0; i < tokens; ++i) sample.response_ids.own().push_back(prompt + index + i);
  sample.logprobs.own().assign(sample.response_ids.size(), -1.0f);
  sample.scaled_logprobs = sample.support_logmass = sample.logprobs;
  if (tokens > 0) sample.weight_versions = {{0, version}};
  return sample;
}

inline FailedSample failure_of(int64_t request, int32_t prompt, int32_t index, int32_t group) {
  return {key_of(request, prompt, index, group),
          {.code = ErrorCode::kNonFinite, .field = "logits"}};
}

}  // namespace rollpack::bridge::testing
