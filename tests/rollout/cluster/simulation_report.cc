// What a run of the simulation tells of the faults that it went through.
#include "tests/rollout/cluster/simulation.h"

namespace rollpack::rollout::simulation {

const std::array<const char*, kNumFaults> kFaultNames = {
    "death",           "death in an update", "stop",         "short stop",
    "zombie",          "engine failure",     "lost tail",    "duplicate",
    "reorder",         "slow link",          "poison",       "refused chunk",
    "refused switch",  "stopped rank 0",     "abort",        "pause",
    "sleep",           "cancelled update",   "late result",  "conviction",
    "no worker left",  "replacement",        "failed start", "wrong weights",
    "straight",        "withdrawal",         "lost bridge",  "rank 0 death",
    "torn journal",    "client death",       "redelivery",   "passed over",
    "awaited weights", "lost submit"};

void Report::add(const Report& other) {
  for (size_t i = 0; i < kNumFaults; ++i) num_faults[i] += other.num_faults[i];
  num_samples += other.num_samples;
  num_updates += other.num_updates;
}

}  // namespace rollpack::rollout::simulation
