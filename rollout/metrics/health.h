// Whether a serving job is well, and if not, why: what /health answers.
#pragma once

#include <chrono>
#include <string>

#include "rollout/metrics/snapshot.h"

namespace rollpack::rollout {

struct Health {
  bool is_well = false;
  // ok, paused, asleep, without_weights; or starting, draining, broken, no_workers, stuck,
  // unresponsive
  std::string status;
  std::string message;  // why it is not well
};

struct HealthLimits {
  std::chrono::duration<double> lease{30};  // longest silence of a rank that owes progress
  // Longest time that the threads of dispatcher and bridge may leave their numbers unsaid.
  std::chrono::duration<double> answer{10};
};

Health health_of(const Snapshot& snapshot, std::chrono::steady_clock::time_point now,
                 const HealthLimits& limits);

// {"status": .., "message": .., and a few numbers}
std::string health_json(const Health& health, const Snapshot& snapshot);

}  // namespace rollpack::rollout
