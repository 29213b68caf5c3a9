// What `rollpack bench` says of the passes under one batching mode.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "rollout/bench/machine_roof.h"
#include "rollout/bench/pass.h"

namespace rollpack::rollout {

// What the passes ran on.
struct BenchSetting {
  const Workload& workload;
  const Job& job;
  const ModelCost cost;
  const MachineRoof roof;
};

// The fastest of some passes; there is one at least.
const Pass& best_of(const std::vector<Pass>& passes);

// Memory that the work of a pass really used on all ranks, whatever is set aside for it.
struct PassMemory {
  double kv_bytes = 0;          // KV pages in use at once
  double activation_bytes = 0;  // of the largest step
};
PassMemory memory_of(const Pass& pass, const BenchSetting& setting);

// One object a mode; every number but passes_s is that of the fastest pass. Keys:
// README.md.
nlohmann::ordered_json mode_report(const std::string& batching, const std::vector<Pass>& passes,
                                   const BenchSetting& setting);

// Share of time and of the machine's limits of each op, and time outside of ops and steps.
nlohmann::ordered_json profile_report(const Pass& pass, const BenchSetting& setting);
std::string profile_table(const nlohmann::ordered_json& profile);

}  // namespace rollpack::rollout
