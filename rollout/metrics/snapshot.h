// What a serving job looked like at one moment: all that the metrics and the health of it are made
// from. Whoever reads one holds up nobody.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "rollout/cluster/dispatcher.h"
#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/server/wait_histogram.h"

namespace rollpack::rollout {

enum class ServingPhase : uint8_t {
  kStarting,  // nobody can connect yet
  kServing,
  kDraining,  // told to end
};

struct Snapshot {
  ServingPhase phase = ServingPhase::kStarting;
  std::chrono::steady_clock::time_point time;
  // Of the `stats` verb, and what follows from them: num_waiting, kv_cache_usage, slot_usage,
  // prompt_tokens_per_s and generation_tokens_per_s.
  std::map<std::string, double> values;
  std::vector<Dispatcher::WorkerNumbers> workers;  // by rank
  bridge::WaitHistogram batch_waits;
  bridge::Outcome broken;  // why no more samples can be made, if so
  // Since when the bridge's thread owes its numbers, if it does.
  std::optional<std::chrono::steady_clock::time_point> bridge_asked;
};

}  // namespace rollpack::rollout
