#include "rollout/batching/wave.h"

#include <algorithm>
#include <utility>

namespace rollpack::rollout {

int32_t max_wave_rows(const EngineLimits& limits) {
  return std::min(limits.max_num_seqs, limits.max_num_batched_tokens);
}

std::vector<Sequence*> startable(const EngineState& state) {
  std::vector<Sequence*> sequences;
  for (const auto& [arrival, sequence] : state.waiting) {
    if (state.admits || sequence->has_started()) sequences.push_back(sequence.get());
  }
  return sequences;
}

void start_wave(EngineState& state, std::vector<Sequence*> chosen) {
  std::ranges::sort(chosen, {}, &Sequence::arrival);
  for (Sequence* sequence : chosen) {
    sequence->slot = state.free_slots.back();
    state.free_slots.pop_back();
    state.running.push_back(state.waiting.take(*sequence));
  }
}

void release_finished(EngineState& state) {
  std::erase_if(state.running, [&](const std::unique_ptr<Sequence>& sequence) {
    if (sequence->is_finished) state.release(*sequence);
    return sequence->is_finished;
  });
}

void requeue_wave(EngineState& state) {
  release_finished(state);
  state.requeue_if([](const Sequence&) { return true; });
}

}  // namespace rollpack::rollout
