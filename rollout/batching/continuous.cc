#include "rollout/batching/continuous.h"

#include <algorithm>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

// Ready for one more row: all its tokens but the newest are computed.
bool is_decoding(const Sequence& sequence) {
  return !sequence.is_finished && !sequence.pages.empty() && sequence.num_remaining() == 1;
}

bool was_started(const std::unique_ptr<Sequence>& sequence) {
  return sequence->has_started();
}

bool is_prefilling(const Sequence& sequence) {
  return !sequence.is_finished && !sequence.pages.empty() && sequence.num_remaining() > 1;
}

// Pages `sequence` lacks to write all its uncomputed tokens: missing ones, and a copy of the page
// it shares with siblings.
int32_t num_pages_lacking(const Sequence& sequence, const EngineState& state) {
  const int32_t page_tokens = state.limits.page_tokens;
  const auto num_held = static_cast<int32_t>(sequence.pages.size());
  const int32_t first = sequence.num_computed / page_tokens;
  const bool copies = first < num_held && state.pool.is_shared(sequence.pages[first]);
  return pages_for(sequence.num_computed + sequence.num_remaining(), page_tokens) - num_held +
         (copies ? 1 : 0);
}

// Gives `sequence` what num_pages_lacking() counts; the pool must have it.
void add_lacking_pages(Sequence& sequence, EngineState& state, StepBatch& batch) {
  const int32_t page_tokens = state.limits.page_tokens;
  bool has_room = try_make_writable(sequence, sequence.num_computed, page_tokens, state.pool,
                                    batch.plan.page_copies);
  if (const int32_t num_more = num_pages_lacking(sequence, state); num_more > 0) {
    has_room = has_room && state.pool.try_allocate(num_more, sequence.pages);
  }
  if (!has_room) fail_invariant("KV pages that were counted as free are not");
}

// Whom preemption costs least: fewest computed tokens of its own, then the youngest.
size_t cheapest_to_preempt(const EngineState& state) {
  size_t best = state.running.size();
  for (size_t i = 0; i < state.running.size(); ++i) {
    const Sequence& candidate = *state.running[i];
    if (candidate.pages.empty()) continue;
    if (best == state.running.size()) {
      best = i;
      continue;
    }
    const Sequence& chosen = *state.running[best];
    if (std::pair(candidate.num_own_computed(), chosen.arrival) <
        std::pair(chosen.num_own_computed(), candidate.arrival)) {
      best = i;
    }
  }
  return best;
}

// Rows for the next `num_tokens` tokens of `sequence`, and the draws that become possible with
// them: its own at its last token, its followers' first at the prompt's last token.
void add_chunk(Sequence& sequence, int32_t num_tokens, StepBatch& batch) {
  const int32_t last_prompt_row =
      batch.num_rows() + sequence.num_prompt - 1 - sequence.num_computed;
  const bool ends_prompt = sequence.num_computed < sequence.num_prompt &&
                           sequence.num_computed + num_tokens >= sequence.num_prompt;
  const bool ends = num_tokens == sequence.num_remaining();
  batch.add_rows(sequence, num_tokens);
  if (sequence.is_score()) return;
  if (ends) batch.add_sample(sequence);
  if (!ends_prompt || sequence.group->leader != &sequence) return;
  for (Sequence* follower : sequence.group->followers) {
    if (follower->num_response() == 0) batch.add_sample(*follower, last_prompt_row);
  }
}

void share_pages(const std::vector<int32_t>& pages, int32_t count, PagePool& pool,
                 Sequence& target) {
  for (int32_t i = 0; i < count; ++i) {
    pool.add_reference(pages[i]);
    target.pages.push_back(pages[i]);
  }
}

}  // namespace

void ContinuousBatching::plan(EngineState& state, StepBatch& batch) {
  secure_pages(state, batch);
  requeue_orphans(state);
  admit(state, batch);
  add_decoding_rows(state, batch);
  add_prefill_chunks(state, batch);
  if (batch.empty() && !state.running.empty()) fail_invariant("sequences run but none has a row");
}

void ContinuousBatching::secure_pages(EngineState& state, StepBatch& batch) {
  const auto computes = [](const Sequence& s) { return !s.is_finished && !s.pages.empty(); };
  for (;;) {
    int32_t num_lacking = 0;
    for (const auto& sequence : state.running) {
      if (computes(*sequence)) num_lacking += num_pages_lacking(*sequence, state);
    }
    if (num_lacking <= state.pool.num_free()) break;
    if (!state.pinned_prompts.empty()) {
      state.unpin(*state.pinned_prompts.rbegin()->second);
      continue;
    }
    state.requeue(cheapest_to_preempt(state));
    ++state.counters.num_preemptions;
  }
  for (const auto& sequence : state.running) {
    if (computes(*sequence)) add_lacking_pages(*sequence, state, batch);
  }
}

void ContinuousBatching::requeue_orphans(EngineState& state) {
  for (size_t i = state.running.size(); i-- > 0;) {
    const Sequence& sequence = *state.running[i];
    if (sequence.pages.empty() && sequence.group->leader == nullptr) state.requeue(i);
  }
}

void ContinuousBatching::admit(EngineState& state, StepBatch& batch) {
  auto next = state.waiting.begin();
  while (!state.free_slots.empty()) {
    // While nothing new may start, what was preempted still comes back.
    if (!state.admits) next = std::find_if(next, state.waiting.end(), was_started);
    if (next == state.waiting.end() || !try_admit(state, **next, batch)) return;
    Sequence& sequence = **next;
    sequence.slot = state.free_slots.back();
    state.free_slots.pop_back();
    if (Group* group = sequence.group.get()) {
      if (--group->num_waiting == 0 && !group->prompt_pages.empty()) state.unpin(*group);
    }
    state.running.push_back(std::move(*next));
    next = state.waiting.erase(next);
  }
}

bool ContinuousBatching::try_admit(EngineState& state, Sequence& sequence, StepBatch& batch) {
  const int32_t page_tokens = state.limits.page_tokens;
  Group* group = state.limits.prefix_sharing ? sequence.group.get() : nullptr;
  const bool follows = group != nullptr && group->leader != nullptr;
  const int32_t num_shared =
      group != nullptr ? static_cast<int32_t>(group->prompt_pages.size()) : 0;
  // A shared prompt leaves its last token to compute (for its logits) where no token was drawn yet.
  const int32_t num_computed =
      num_shared == 0 ? 0 : sequence.num_prompt - (sequence.num_response() == 0 ? 1 : 0);
  // Whoever was preempted comes back only when all it may still need fits: no thrashing.
  const bool was_preempted = sequence.has_started();
  const int32_t num_covered =
      was_preempted ? sequence.end_position : sequence.num_computed + sequence.num_remaining();
  const int32_t num_own = follows && !was_preempted ? 1
                          : num_shared == 0
                              ? pages_for(num_covered, page_tokens)
                              : pages_for(num_covered, page_tokens) - num_computed / page_tokens;
  // Every running sequence may soon want one page more.
  const auto num_wanted = [&] {
    return num_own + static_cast<int32_t>(state.running.size());
  };
  while (num_wanted() > state.pool.num_free()) {
    auto pinned = std::find_if(state.pinned_prompts.rbegin(), state.pinned_prompts.rend(),
                               [&](const auto& entry) { return entry.second != group; });
    if (pinned != state.pinned_prompts.rend()) {
      state.unpin(*pinned->second);
    } else if (group != nullptr && num_shared > 0 && state.running.empty()) {
      state.unpin(*group);  // alone and still too large: compute the prompt again in its own pages
      return try_admit(state, sequence, batch);
    } else {
      return false;
    }
  }
  if (follows) {
    group->followers.push_back(&sequence);
    return true;
  }
  if (num_shared > 0) {
    share_pages(group->prompt_pages, num_shared, state.pool, sequence);
    sequence.num_computed = num_computed;
  } else if (group != nullptr) {
    group->leader = &sequence;
  }
  add_lacking_pages(sequence, state, batch);
  return true;
}

void ContinuousBatching::add_decoding_rows(EngineState& state, StepBatch& batch) {
  const size_t num_running = state.running.size();
  if (first_row_ >= num_running) first_row_ = 0;
  for (size_t i = 0; i < num_running; ++i) {
    const size_t index = (first_row_ + i) % num_running;
    Sequence& sequence = *state.running[index];
    if (!is_decoding(sequence)) continue;
    if (batch.num_rows() == state.limits.max_num_batched_tokens) {
      first_row_ = index;  // the next step goes on where this one ran out
      return;
    }
    add_chunk(sequence, 1, batch);
  }
  first_row_ = 0;
}

void ContinuousBatching::add_prefill_chunks(EngineState& state, StepBatch& batch) {
  for (const auto& owned : state.running) {
    Sequence& sequence = *owned;
    if (!is_prefilling(sequence)) continue;
    const int32_t budget = state.limits.max_num_batched_tokens - batch.num_rows();
    const int32_t num_tokens = std::min(budget, sequence.num_remaining());
    if (num_tokens == 0) return;
    // Without chunks a prefill waits for a step with room for all of it; a recomputation that is
    // longer than any step has to be cut all the same.
    if (!state.limits.chunked_prefill && num_tokens < sequence.num_remaining() && !batch.empty()) {
      continue;
    }
    add_chunk(sequence, num_tokens, batch);
  }
}

void ContinuousBatching::after_step(EngineState& state, const StepBatch& batch) {
  for (const StepBatch::Entry& entry : batch.entries) {
    if (entry.sequence == nullptr) continue;
    Sequence& sequence = *entry.sequence;
    sequence.num_computed += entry.num_tokens;
    Group* group = sequence.group.get();
    if (group == nullptr || group->leader != &sequence) continue;
    if (sequence.num_computed < sequence.num_prompt) continue;
    // The prompt is done: siblings share its pages, and write into copies from here on.
    group->leader = nullptr;
    const int32_t num_pages = pages_for(sequence.num_prompt, state.limits.page_tokens);
    for (Sequence* follower : std::exchange(group->followers, {})) {
      share_pages(sequence.pages, num_pages, state.pool, *follower);
      follower->num_computed = follower->num_prompt;
    }
    if (group->num_waiting > 0 && group->prompt_pages.empty()) {
      for (int32_t i = 0; i < num_pages; ++i) {
        state.pool.add_reference(sequence.pages[i]);
        group->prompt_pages.push_back(sequence.pages[i]);
      }
      state.pinned_prompts[group->arrival] = group;
    }
  }
}

void ContinuousBatching::retire(EngineState& state) {
  std::erase_if(state.running, [&](const std::unique_ptr<Sequence>& sequence) {
    if (sequence->is_finished) state.release(*sequence);
    return sequence->is_finished;
  });
}

void ContinuousBatching::drop_kv(EngineState& state) {
  while (!state.pinned_prompts.empty()) state.unpin(*state.pinned_prompts.begin()->second);
  while (!state.running.empty()) state.requeue(state.running.size() - 1);
  first_row_ = 0;
}

}  // namespace rollpack::rollout
