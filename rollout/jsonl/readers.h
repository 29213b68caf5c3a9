// The three inputs of the command line, one JSON object a line: prompts, sequences, workload.
// Every error names "file:line". Blank lines are skipped; "-" is standard input.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "trainer_bridge/contract/rollout_service.h"

namespace rollpack::rollout {

// Lines {"prompt_id"?, "input_ids", "n"?, "sampling"?}. An absent prompt_id is the line's number,
// from 0, as an integer.
// Errors: not_found; invalid_argument naming line, key and value; a prompt_id that two lines share
// names both. Ranges that need the model (vocabulary, context) are checked where it is known.
std::vector<bridge::PromptRequest> read_prompts(const std::string& path);

// Lines {"id"?, "input_ids", "response_ids", "temperature"?}; ids may repeat, results come in
// order.
std::vector<bridge::ScoreSequence> read_sequences(const std::string& path);

// One prompt and the fixed lengths of its samples.
struct WorkloadGroup {
  bridge::PromptId prompt_id;
  std::vector<int32_t> input_ids;        // empty where only the length is given
  int32_t prompt_tokens = 0;             // always set
  std::vector<int32_t> response_tokens;  // one a sample
};

// Lines {"prompt_id"?, "input_ids" or "prompt_tokens", "response_tokens"}.
std::vector<WorkloadGroup> read_workload(const std::string& path);

}  // namespace rollpack::rollout
