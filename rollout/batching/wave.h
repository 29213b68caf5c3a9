// What the modes that work in waves have in common: a wave takes waiting sequences when nothing
// runs, and all of it ends before the next one starts.
#pragma once

#include <vector>

#include "rollout/engine/engine_state.h"

namespace rollpack::rollout {

// Rows a wave may have: every one of them takes part in every step.
int32_t max_wave_rows(const EngineLimits& limits);
// Waiting sequences that may start now, oldest first.
std::vector<Sequence*> startable(const EngineState& state);
// Moves `chosen` from waiting to running, each with a slot; of two, the older comes first.
void start_wave(EngineState& state, std::vector<Sequence*> chosen);
// Gives back whatever has finished and takes it out of `running`.
void release_finished(EngineState& state);
// Everything unfinished goes back to the queue, its keys and values forgotten.
void requeue_wave(EngineState& state);

}  // namespace rollpack::rollout
