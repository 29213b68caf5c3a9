#include "rollout/bench/workload.h"

#include <memory>
#include <utility>

#include "kernels/philox.h"
#include "rollout/sampling/request_sampling.h"

namespace rollpack::rollout {
namespace {

std::vector<int32_t> prompt_ids(const WorkloadGroup& group, uint32_t index, int64_t V) {
  if (!group.input_ids.empty()) return group.input_ids;
  std::vector<int32_t> ids(group.prompt_tokens);
  for (size_t i = 0; i < ids.size(); ++i) {
    const uint32_t word = kernels::philox4x32({static_cast<uint32_t>(i), index, 0, 0}, {0, 0})[0];
    ids[i] = static_cast<int32_t>(uint64_t{word} * static_cast<uint64_t>(V) >> 32);
  }
  return ids;
}

}  // namespace

Workload load_workload(const std::string& path) {
  Workload workload{.groups = read_workload(path)};
  for (const WorkloadGroup& group : workload.groups) {
    workload.num_samples += static_cast<int64_t>(group.response_tokens.size());
    workload.num_prompt_tokens += group.prompt_tokens;
    for (const int32_t length : group.response_tokens) workload.num_response_tokens += length;
  }
  return workload;
}

std::vector<GroupRequest> make_groups(const Workload& workload, const Config& config,
                                      const ModelConfig& model) {
  std::vector<GroupRequest> requests;
  for (size_t i = 0; i < workload.groups.size(); ++i) {
    const WorkloadGroup& group = workload.groups[i];
    GroupRequest request;
    request.key.prompt_id = group.prompt_id;
    request.key.group_size = static_cast<int32_t>(group.response_tokens.size());
    request.prompt_ids = std::make_shared<const std::vector<int32_t>>(
        prompt_ids(group, static_cast<uint32_t>(i), model.vocab_size));
    request.sampling = resolve_sampling(config.rollout, {.ignore_eos = true}, model.eos_token_ids,
                                        model.vocab_size, "workload");
    request.response_lengths = group.response_tokens;
    request.ignores_stops = true;
    requests.push_back(std::move(request));
  }
  return requests;
}

double workload_flops(const Workload& workload, const ModelCost& cost) {
  double flops = 0;
  for (const WorkloadGroup& group : workload.groups) {
    const int64_t P = group.prompt_tokens;
    flops += cost.linear_flops() * static_cast<double>(P) + cost.attention_flops(0, P);
    for (const int32_t R : group.response_tokens) {
      if (R < 1) continue;
      flops += cost.linear_flops() * (R - 1) + cost.attention_flops(P, P + R - 1) +
               cost.head_flops() * R;
    }
  }
  return flops;
}

}  // namespace rollpack::rollout
