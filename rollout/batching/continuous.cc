#include "rollout/batching/continuous.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "kernels/base/error.h"
#include "rollout/batching/drafting.h"
#include "rollout/batching/page_needs.h"
#include "rollout/batching/pages_under_way.h"

namespace rollpack::rollout {
namespace {

// Ready for one more row: all its tokens but the newest are computed.
bool is_decoding(const Sequence& sequence) {
  return computes(sequence) && sequence.num_remaining() == 1;
}

bool is_prefilling(const Sequence& sequence) {
  return computes(sequence) && sequence.num_remaining() > 1;
}

// A follower whose leader is gone: back in the queue, one of them will lead.
bool is_orphan(const Sequence& sequence) {
  return !sequence.is_finished && sequence.pages.empty() && sequence.group->leader == nullptr;
}

// Gives `sequence` what it lacks for its known tokens; the pool must have it free.
void add_lacking_pages(Sequence& sequence, EngineState& state, StepBatch& batch) {
  bool has_room = try_make_writable(sequence, sequence.num_computed, state.limits.page_tokens,
                                    state.pool, batch.plan.page_copies);
  batch.copying.resize(batch.plan.page_copies.size(), &sequence);
  const int32_t num_more = num_pages_lacking(sequence, sequence.known_end(), state);
  has_room = has_room && state.pool.try_allocate(num_more, sequence.pages);
  if (!has_room) fail_invariant("KV pages that were counted as free are not");
}

// What running sequences want, together.
int32_t sum_of_wants(const EngineState& state) {
  int32_t sum = 0;
  for (const auto& sequence : state.running) sum += num_pages_wanted(*sequence, state);
  return sum;
}

// Whom preemption costs least comes first: fewest computed private tokens, then the youngest. Who
// was promised pages comes after the others, and just before them the oldest of the others: it
// yields to a promise only, and so always gets on.
std::vector<Sequence*> by_cost_of_preemption(const EngineState& state) {
  struct Victim {
    bool has_promise;
    int32_t num_private;
    Sequence* sequence;
  };
  std::vector<Victim> victims;
  for (const auto& sequence : state.running) {
    if (!computes(*sequence)) continue;
    victims.push_back(
        {has_promise(*sequence), num_private_tokens(*sequence, state), sequence.get()});
  }
  const auto arrival = [](const Victim& victim) { return victim.sequence->arrival; };
  std::ranges::sort(victims, [&](const Victim& a, const Victim& b) {
    return std::tuple(a.has_promise, a.num_private, arrival(b)) <
           std::tuple(b.has_promise, b.num_private, arrival(a));
  });
  const auto promised = std::ranges::find(victims, true, &Victim::has_promise);
  const auto oldest = std::ranges::min_element(victims.begin(), promised, {}, arrival);
  if (oldest != promised) std::rotate(oldest, oldest + 1, promised);
  std::vector<Sequence*> sequences;
  for (const Victim& victim : victims) sequences.push_back(victim.sequence);
  return sequences;
}

// The sequence starts or comes back with `num_computed` computed tokens; what it had lost beyond
// them is computed once more.
void begin_at(Sequence& sequence, int32_t num_computed, EngineState& state) {
  sequence.num_computed = num_computed;
  sequence.kv_version = state.weight_version;
  sequence.num_filed = num_computed / state.limits.page_tokens;
  state.counters.num_tokens_recomputed += std::max(0, sequence.num_lost - num_computed);
  sequence.num_lost = 0;
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

}  // namespace

void ContinuousBatching::plan(EngineState& state, StepBatch& batch) {
  state.requeue_if(is_orphan);
  secure_pages(state, batch);
  admit(state, batch);
  add_decoding_rows(state, batch);
  add_prefill_chunks(state, batch);
  if (batch.empty() && !state.running.empty() && state.num_steps_under_way == 0) {
    fail_invariant("sequences run but none has a row");
  }
}

bool ContinuousBatching::can_plan_ahead(const EngineState& state) const {
  return !may_propose_drafts(state) && sum_of_wants(state) <= state.pool.num_available();
}

void ContinuousBatching::secure_pages(EngineState& state, StepBatch& batch) {
  const int32_t num_wanted = sum_of_wants(state);
  if (num_wanted > state.pool.num_available()) preempt(state, num_wanted);
  int32_t num_lacking = 0;
  for (const auto& sequence : state.running) {
    if (!computes(*sequence)) continue;
    num_lacking += num_pages_lacking(*sequence, sequence->known_end(), state);
  }
  if (num_lacking == 0) return;
  state.index.make_free(num_lacking);
  for (const auto& sequence : state.running) {
    if (computes(*sequence)) add_lacking_pages(*sequence, state, batch);
  }
}

void ContinuousBatching::preempt(EngineState& state, int32_t num_wanted) {
  for (Sequence* victim : by_cost_of_preemption(state)) {
    if (num_wanted <= state.pool.num_available()) break;
    num_wanted -= num_pages_wanted(*victim, state);
    if (const Group* group = victim->group.get(); group != nullptr && group->leader == victim) {
      for (const Sequence* orphan : group->followers) {
        num_wanted -= num_pages_wanted(*orphan, state);
      }
    }
    // Until someone takes its pages it may come back to them.
    state.file(*victim, victim->num_computed);
    victim->was_preempted = true;
    victim->num_lost = victim->num_computed;
    state.release(*victim);
    ++state.counters.num_preemptions;
  }
  state.requeue_if(
      [](const Sequence& sequence) { return sequence.slot < 0 || is_orphan(sequence); });
}

void ContinuousBatching::admit(EngineState& state, StepBatch& batch) {
  if (state.waiting.empty() || state.free_slots.empty()) return;
  PagesUnderWay under_way(state);
  int32_t num_wanted = sum_of_wants(state);
  // Whoever waits for a page under way keeps a slot free for itself: nobody younger takes it.
  size_t num_deferred = 0, num_started = state.waiting.num_started();
  auto next = state.waiting.begin();
  while (next != state.waiting.end() && state.free_slots.size() > num_deferred) {
    Sequence& sequence = *(next++)->second;
    if (!state.admits) {  // nothing new may start, but what was preempted still comes back
      if (num_started == 0) return;
      if (!sequence.has_started()) continue;
      --num_started;
    }
    // Every running sequence may soon want one page more.
    const int32_t num_spare =
        state.pool.num_available() - num_wanted - static_cast<int32_t>(state.running.size());
    const Blocked now{sequence.arrival, num_spare, state.index.num_changes()};
    if (!state.running.empty() && blocked_.still_holds(now)) return;
    switch (try_admit(state, sequence, num_spare, under_way, batch)) {
      case Admission::kDeferred:
        ++num_deferred;
        continue;
      case Admission::kNoRoom:
        blocked_ = now;
        return;
      case Admission::kAdmitted:
        break;
    }
    sequence.slot = state.free_slots.back();
    state.free_slots.pop_back();
    num_wanted += num_pages_wanted(sequence, state);
    state.running.push_back(state.waiting.take(sequence));
  }
}

ContinuousBatching::Admission ContinuousBatching::try_admit(EngineState& state, Sequence& sequence,
                                                            int32_t num_spare,
                                                            PagesUnderWay& under_way,
                                                            StepBatch& batch) {
  // Twice as long as it is: so what is ever computed again of a sequence is at most twice its
  // tokens in the end, however often pages run out.
  const int32_t promised_end =
      sequence.was_preempted ? std::min(sequence.end_position, 2 * sequence.length()) : 0;
  Group* group = state.limits.prefix_sharing ? sequence.group.get() : nullptr;
  if (group != nullptr && group->leader != nullptr) {
    // The prompt's last row is under way: it will be found.
    if (group->leader->num_computed >= group->leader->num_prompt) return Admission::kDeferred;
    sequence.promised_end = promised_end;
    const int32_t num_own = num_pages_wanted(sequence, state);
    const int32_t num_copies = group->followers.empty() ? 1 : 0;  // of the leader, see there
    if (num_own + num_copies > num_spare) {
      sequence.promised_end = 0;
      return Admission::kNoRoom;
    }
    group->followers.push_back(&sequence);
    return Admission::kAdmitted;
  }
  if (const Admission found = take_prefix(state, sequence, promised_end, num_spare, under_way);
      found != Admission::kAdmitted) {
    return found;
  }
  sequence.promised_end = promised_end;
  if (group != nullptr && sequence.num_computed < sequence.num_prompt) group->leader = &sequence;
  state.index.make_free(num_pages_lacking(sequence, sequence.known_end(), state));
  add_lacking_pages(sequence, state, batch);
  under_way.add(sequence);
  return Admission::kAdmitted;
}

ContinuousBatching::Admission ContinuousBatching::take_prefix(EngineState& state,
                                                              Sequence& sequence,
                                                              int32_t promised_end,
                                                              int32_t num_spare,
                                                              const PagesUnderWay& under_way) {
  const int32_t page_tokens = state.limits.page_tokens;
  PrefixIndex::Match match;
  // A draw needs the logits of the last token, a scored sequence those from the prompt's last on.
  const int32_t end = (sequence.is_score() ? sequence.num_prompt : sequence.length()) - 1;
  if (state.limits.prefix_sharing) {
    match = state.index.find(state.weight_version, std::span(sequence.tokens).first(end));
    const std::span whole = std::span(match.pages).first(match.num_tokens / page_tokens);
    if (under_way.contains(sequence, whole, end)) return Admission::kDeferred;
  }
  const int32_t num_available = state.pool.num_available();
  for (const int32_t page : match.pages) state.pool.add_reference(page);
  const int32_t num_needed = pages_for(std::max(sequence.known_end(), promised_end), page_tokens) -
                             match.num_tokens / page_tokens;
  const auto has_room = [&] {
    // Pages that were idle are not available any more.
    return num_needed + num_available - state.pool.num_available() <= num_spare;
  };
  if (match.num_tokens % page_tokens != 0 && !has_room()) {  // no room for a page and its copy
    state.pool.release(match.pages.back());
    match.pages.pop_back();
    match.num_tokens -= match.num_tokens % page_tokens;
  }
  if (!has_room()) {
    state.pool.release_all(match.pages);
    return Admission::kNoRoom;
  }
  if (state.limits.prefix_sharing && !sequence.was_preempted) {
    state.counters.prefix_cache_queries += end;
    state.counters.prefix_cache_hits += match.num_tokens;
  }
  sequence.pages = std::move(match.pages);
  begin_at(sequence, match.num_tokens, state);
  return Admission::kAdmitted;
}

void ContinuousBatching::add_decoding_rows(EngineState& state, StepBatch& batch) {
  propose_drafts(state);
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
    add_draft_rows(sequence, state, batch);
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
    // Without chunks a prefill waits for a step with room for all of it, and those after it wait
    // too, or it might wait for ever; a recomputation longer than any step is cut all the same.
    if (!state.limits.chunked_prefill && num_tokens < sequence.num_remaining() && !batch.empty()) {
      return;
    }
    add_chunk(sequence, num_tokens, batch);
  }
}

void ContinuousBatching::after_step(EngineState& state, const StepBatch& batch) {
  for (const StepBatch::Entry& entry : batch.entries) {
    if (entry.sequence == nullptr || entry.sequence->is_finished) continue;
    Sequence& sequence = *entry.sequence;
    const bool was_in_prompt = sequence.num_done() - entry.num_tokens < sequence.num_prompt;
    if (was_in_prompt) share_prompt(state, sequence);
  }
}

void ContinuousBatching::share_prompt(EngineState& state, Sequence& sequence) {
  const int32_t page_tokens = state.limits.page_tokens;
  if (sequence.num_done() < sequence.num_prompt) {
    state.file(sequence, sequence.num_done() / page_tokens * page_tokens);
    return;
  }
  state.file(sequence, sequence.num_prompt);
  Group* group = sequence.group.get();
  if (group == nullptr || group->leader != &sequence) return;
  // Siblings share the prompt's pages, and write into copies from here on.
  group->leader = nullptr;
  const int32_t num_pages = pages_for(sequence.num_prompt, page_tokens);
  for (Sequence* follower : std::exchange(group->followers, {})) {
    for (int32_t i = 0; i < num_pages; ++i) {
      state.pool.add_reference(sequence.pages[i]);
      follower->pages.push_back(sequence.pages[i]);
    }
    begin_at(*follower, follower->num_prompt, state);
  }
}

void ContinuousBatching::retire(EngineState& state) {
  std::erase_if(state.running, [&](const std::unique_ptr<Sequence>& sequence) {
    if (!sequence->is_finished || sequence->num_uses_under_way > 0) return false;
    // Its text may be part of a later prompt.
    state.file(*sequence, sequence->num_computed);
    remember_text(state, *sequence);
    state.release(*sequence);
    return true;
  });
}

void ContinuousBatching::drop_kv(EngineState& state) {
  state.requeue_if([](const Sequence&) { return true; });
  // Nobody was preempted under the new weights, and what must be computed again is their price.
  for (const auto& [arrival, sequence] : state.waiting) {
    sequence->was_preempted = false;
    sequence->num_lost = 0;
  }
  first_row_ = 0;
  blocked_ = {};
}

}  // namespace rollpack::rollout
