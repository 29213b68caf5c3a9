// What the engine hands to the trainer's side: one finished sample, or one typed failure.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "trainer_bridge/contract/numbers.h"

namespace rollpack::bridge {

// A prompt's name as its user gave it. Text and integer ids with equal text are the same id (7 and
// "7"); the kind is kept only to echo it.
struct PromptId {
  std::string text;
  bool is_integer = false;

  bool operator==(const PromptId& other) const { return text == other.text; }
};

enum class FinishReason : uint8_t { kStop = 0, kLength = 1, kAbort = 2 };

// Weight version `version` drew the tokens from response index `first_token` to the next span's.
struct VersionSpan {
  int32_t first_token = 0;
  int64_t version = 0;

  bool operator==(const VersionSpan&) const = default;
};

// Where a sample belongs: the submit that asked for it, the prompt's place in it, its place in the
// group of `group_size` samples of that prompt.
struct SampleKey {
  int64_t request_id = 0;
  int32_t prompt_index = 0;
  PromptId prompt_id;
  int32_t sample_index = 0;
  int32_t group_size = 1;
  int32_t node = 0;  // whose bridge asked for it; 0: rank 0's
};

struct Sample {
  SampleKey key;
  std::shared_ptr<const std::vector<int32_t>> prompt_ids;  // shared by the group
  Numbers<int32_t> response_ids;                           // the stop token included
  // One entry a response token; see design of logprobs in trainer_bridge/README.md.
  Numbers<float> logprobs;
  Numbers<float> scaled_logprobs;
  Numbers<float> support_logmass;
  Numbers<float> entropy;  // empty unless the configuration asks for the column
  // log softmax(logits / temperature)[x] of the reference policy; empty where there is none, or
  // where the engine stopped before it had scored.
  Numbers<float> ref_log_prob;
  FinishReason finish_reason = FinishReason::kLength;
  int32_t stop_token_id = -1;  // -1: no stop token ended it
  float temperature = 1.0f;
  std::vector<VersionSpan> weight_versions;  // ascending first_token; empty for an empty response
};

// The same tokens, as those of a sample that was aborted there.
inline void end_as_aborted(Sample& sample) {
  sample.finish_reason = FinishReason::kAbort;
  sample.stop_token_id = -1;
}

struct FailedSample {
  SampleKey key;
  ErrorInfo error;
};

}  // namespace rollpack::bridge
