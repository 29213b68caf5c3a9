// The lines that the command line writes: samples, failed samples, scored sequences. Keys come in a
// fixed order and floats in their shortest form that reads back to the same bits, so that equal
// results are equal bytes.
#pragma once

#include <string>

#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/contract/sample.h"

namespace rollpack::rollout {

// {"prompt_id", "sample_index", "response_ids", "logprobs", "scaled_logprobs", "support_logmass",
// "finish_reason", "stop_token_id", "weight_version", "cumulative_logprob"}, newline included.
// weight_version is the first token's, -1 for an empty response; "weight_versions" follows it where
// there was more than one. stop_token_id is -1 where none ended the sample. cumulative_logprob is
// the sum of "logprobs" in f64, in order, rounded once.
// Errors: non_finite naming sample, key and token; internal where a column's length differs from
// response_ids.
std::string sample_line(const bridge::Sample& sample);

// {"prompt_id", "sample_index", "error": {"code", "field", "value", "origin", "allowed",
// "message"}}.
std::string failed_line(const bridge::FailedSample& sample);

// {"id", "logprobs", "scaled_logprobs", "entropy"}.
std::string scored_line(const bridge::ScoredSequence& sequence);

}  // namespace rollpack::rollout
