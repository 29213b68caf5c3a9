#include "rollout/engine/engine_state.h"

#include <span>
#include <utility>

namespace rollpack::rollout {

EngineState::EngineState(const EngineLimits& engine_limits)
    : limits(engine_limits), pool(limits.num_pages), index(pool, limits.page_tokens) {
  for (int32_t slot = limits.max_num_seqs - 1; slot >= 0; --slot) free_slots.push_back(slot);
}

void EngineState::release(Sequence& sequence) {
  pool.release_all(sequence.pages);
  sequence.num_filed = 0;
  if (sequence.slot >= 0) free_slots.push_back(std::exchange(sequence.slot, -1));
  sequence.slot_is_set = false;
  if (Group* group = sequence.group.get()) {
    if (group->leader == &sequence) {
      group->leader = nullptr;
      group->followers.clear();
    }
    std::erase(group->followers, &sequence);
  }
}

void EngineState::requeue(size_t index) {
  std::unique_ptr<Sequence> sequence = std::move(running[index]);
  running.erase(running.begin() + static_cast<ptrdiff_t>(index));
  return_to_queue(std::move(sequence));
}

void EngineState::return_to_queue(std::unique_ptr<Sequence> sequence) {
  release(*sequence);
  sequence->num_computed = 0;
  sequence->promised_end = 0;
  if (sequence->is_score()) {  // scored again as a whole, so that one weight version scores it
    sequence->logprobs.clear();
    sequence->scaled_logprobs.clear();
    sequence->entropy.clear();
  }
  enqueue(std::move(sequence));
}

void EngineState::file(Sequence& sequence, int32_t num_tokens) {
  if (!limits.prefix_sharing || sequence.is_failed || sequence.pages.empty()) return;
  const std::span<const int32_t> tokens(sequence.tokens);
  sequence.num_filed = index.insert(sequence.kv_version, tokens.first(num_tokens),
                                    sequence.num_filed, sequence.pages);
}

bool EngineState::try_allocate(int32_t count, std::vector<int32_t>& pages) {
  if (count > pool.num_available()) return false;
  index.make_free(count);
  return pool.try_allocate(count, pages);
}

}  // namespace rollpack::rollout
