#include "rollout/engine/engine_state.h"

#include <algorithm>
#include <utility>

namespace rollpack::rollout {

EngineState::EngineState(const EngineLimits& engine_limits)
    : limits(engine_limits), pool(engine_limits.num_pages) {
  for (int32_t slot = limits.max_num_seqs - 1; slot >= 0; --slot) free_slots.push_back(slot);
}

void EngineState::release(Sequence& sequence) {
  pool.release_all(sequence.pages);
  if (sequence.slot >= 0) free_slots.push_back(std::exchange(sequence.slot, -1));
  sequence.slot_is_set = false;
  if (Group* group = sequence.group.get()) {
    if (group->leader == &sequence) group->leader = nullptr;
    std::erase(group->followers, &sequence);
  }
}

void EngineState::requeue(size_t index) {
  std::unique_ptr<Sequence> sequence = std::move(running[index]);
  running.erase(running.begin() + static_cast<ptrdiff_t>(index));
  release(*sequence);
  sequence->num_computed = 0;
  if (sequence->is_score()) {  // scored again as a whole, so that one weight version scores it
    sequence->logprobs.clear();
    sequence->scaled_logprobs.clear();
    sequence->entropy.clear();
  }
  enqueue(std::move(sequence));
}

void EngineState::unpin(Group& group) {
  pool.release_all(group.prompt_pages);
  pinned_prompts.erase(group.arrival);
}

void EngineState::enqueue(std::unique_ptr<Sequence> sequence) {
  if (sequence->group) ++sequence->group->num_waiting;
  if (waiting.empty() || waiting.back()->arrival < sequence->arrival) {
    waiting.push_back(std::move(sequence));
    return;
  }
  const auto place = std::upper_bound(
      waiting.begin(), waiting.end(), sequence->arrival,
      [](uint64_t arrival, const auto& other) { return arrival < other->arrival; });
  waiting.insert(place, std::move(sequence));
}

}  // namespace rollpack::rollout
