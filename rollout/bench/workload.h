// The work of a benchmark: prompts and the fixed lengths of their samples.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "rollout/config/config.h"
#include "rollout/engine/request.h"
#include "rollout/jsonl/readers.h"
#include "rollout/measurement/roofline.h"

namespace rollpack::rollout {

struct Workload {
  std::vector<WorkloadGroup> groups;
  int64_t num_samples = 0;
  int64_t num_prompt_tokens = 0;  // once a group
  int64_t num_response_tokens = 0;
};

// Errors: those of read_workload().
Workload load_workload(const std::string& path);

// Requests for all of it, stops ignored. Where a prompt gives a length only, token i of prompt p is
// drawn by (p, i) alone.
std::vector<GroupRequest> make_groups(const Workload& workload, const Config& config,
                                      const ModelConfig& model);

// Multiply-adds x 2 that it needs at least: a prompt once a group, each response token but the last
// through the layers, each sampled token through the head, each visible (token, key) pair.
double workload_flops(const Workload& workload, const ModelCost& cost);

}  // namespace rollpack::rollout
