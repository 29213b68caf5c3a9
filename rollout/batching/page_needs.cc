#include "rollout/batching/page_needs.h"

#include <algorithm>

#include "rollout/engine/step_batch.h"

namespace rollpack::rollout {

int32_t num_pages_lacking(const Sequence& sequence, int32_t end, const EngineState& state) {
  const int32_t page_tokens = state.limits.page_tokens;
  const auto num_held = static_cast<int32_t>(sequence.pages.size());
  const int32_t first = sequence.num_computed / page_tokens;
  const bool copies =
      first < num_held &&
      !state.pool.is_writable(sequence.pages[first], sequence.num_computed % page_tokens);
  return std::max(0, pages_for(end, page_tokens) - num_held) + (copies ? 1 : 0);
}

int32_t num_pages_wanted(const Sequence& sequence, const EngineState& state) {
  if (sequence.is_finished) return 0;
  if (sequence.pages.empty()) {
    const int32_t page_tokens = state.limits.page_tokens;
    const int32_t end = std::max(sequence.length() + 1, sequence.promised_end);
    return pages_for(end, page_tokens) - sequence.num_prompt / page_tokens;
  }
  const Group* group = sequence.group.get();
  const bool is_followed =
      group != nullptr && group->leader == &sequence && !group->followers.empty();
  const int32_t end = std::max(sequence.known_end(), sequence.promised_end);
  const int32_t num_own = computes(sequence) ? num_pages_lacking(sequence, end, state) : 0;
  return num_own + (is_followed ? 1 : 0);
}

int32_t num_private_tokens(const Sequence& sequence, const EngineState& state) {
  const int32_t page_tokens = state.limits.page_tokens;
  int32_t num_shared = pages_for(sequence.num_computed, page_tokens);
  while (num_shared > 0 && state.pool.num_references(sequence.pages[num_shared - 1]) == 1) {
    --num_shared;
  }
  return std::max(0, sequence.num_computed - num_shared * page_tokens);
}

}  // namespace rollpack::rollout
