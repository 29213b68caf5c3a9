// What every layout says about a sample, listed once: the columns with one entry a sample, and the
// f32 values with one entry a response token, which each layout places in its own shape.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "trainer_bridge/contract/sample.h"
#include "trainer_bridge/layout/column.h"

namespace rollpack::bridge {

// Samples in the order a batch holds them; shared by the columns that are made of them.
using SampleList = std::shared_ptr<const std::vector<const Sample*>>;

// Names the sample in errors: "request 7, prompt 0 (gsm8k-0), sample 3".
std::string sample_name(const Sample& sample);

// Throws unless the sample agrees with itself: as many values as response tokens, version spans
// that cover the response.
// Errors: internal; unsupported for a weight version outside i32.
void check_sample(const Sample& sample);

// Adds request_id, prompt_index, prompt_id_bytes, prompt_id_starts, sample_index, group_size,
// prompt_lens, response_lens, finish_reason, stop_token_id and temperature.
void append_sample_columns(const SampleList& samples, std::vector<Column>& columns);

// A value of each response token.
struct ResponseValues {
  std::string_view name;
  // out [response tokens]
  void (*copy)(const Sample& sample, std::span<float> out);
};

// Those `columns` may name, in the order a batch has them.
std::span<const ResponseValues> optional_response_values();

// rollout_log_probs as `logprobs_mode` says, then those that `columns` names.
std::vector<ResponseValues> response_values(std::string_view logprobs_mode,
                                            std::span<const std::string> columns);

// Names `logprobs_mode` may have.
std::vector<std::string_view> logprobs_modes();

}  // namespace rollpack::bridge
