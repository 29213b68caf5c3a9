#include "rollout/batching/drafting.h"

#include <algorithm>
#include <span>
#include <vector>

#include "kernels/base/error.h"
#include "rollout/batching/page_needs.h"

namespace rollpack::rollout {
namespace {

// Of steps that would be planned ahead where nothing is drafted.
constexpr int32_t kLookInterval = 8;

DraftIndex& texts_of(Group& group) {
  if (!group.texts) group.texts = std::make_unique<DraftIndex>(*group.request.prompt_ids);
  return *group.texts;
}

std::span<const int32_t> response_of(const Sequence& sequence) {
  return std::span(sequence.tokens).subspan(static_cast<size_t>(sequence.num_prompt));
}

// Rows that drafts may take: none that a token known to be needed could have.
int32_t num_rows_for_drafts(const EngineState& state) {
  int64_t num_needed = 0;
  bool is_decoding_only = true;
  for (const auto& sequence : state.running) {
    if (sequence->is_finished) continue;
    const int32_t num_remaining = computes(*sequence) ? sequence->num_remaining() : 0;
    is_decoding_only = is_decoding_only && num_remaining == 1;
    num_needed += num_remaining;
  }
  const bool is_auto = state.limits.speculation == Speculation::kAuto;
  if (is_auto && !is_decoding_only) return 0;  // many rows already, and more to come
  const int32_t max_rows = is_auto ? std::min(kMaxDraftingRows, state.limits.max_num_batched_tokens)
                                   : state.limits.max_num_batched_tokens;
  return static_cast<int32_t>(std::max<int64_t>(0, max_rows - num_needed));
}

}  // namespace

void fit_drafts(std::span<Sequence* const> drafting, int32_t num_rows) {
  const auto length_of = [](const Sequence* sequence) {
    return static_cast<int32_t>(sequence->draft.size());
  };
  const auto num_rows_up_to = [&](int32_t length) {
    int64_t num = 0;
    for (const Sequence* sequence : drafting) num += std::min(length_of(sequence), length);
    return num;
  };
  int32_t longest = 0;
  for (const Sequence* sequence : drafting) longest = std::max(longest, length_of(sequence));
  if (num_rows_up_to(longest) <= num_rows) return;
  // The highest level that fits lies in [fits, exceeds); one row more for all does not.
  int32_t fits = 0, exceeds = longest;
  while (exceeds - fits > 1) {
    const int32_t middle = fits + (exceeds - fits) / 2;
    (num_rows_up_to(middle) <= num_rows ? fits : exceeds) = middle;
  }
  int64_t num_left = num_rows - num_rows_up_to(fits);
  for (auto sequence = drafting.rbegin(); sequence != drafting.rend(); ++sequence) {
    if (length_of(*sequence) <= fits) continue;
    const bool is_longer = num_left > 0;
    (*sequence)->draft.resize(static_cast<size_t>(is_longer ? fits + 1 : fits));
    num_left -= is_longer ? 1 : 0;
  }
}

bool may_propose_drafts(const EngineState& state) {
  if (state.limits.speculation != Speculation::kAuto) {
    return state.limits.speculation == Speculation::kOn;
  }
  const auto num_running = static_cast<int32_t>(state.running.size());
  if (num_running >= kMaxDraftingRows || !state.acceptance.is_due(num_running)) return false;
  // Texts in which nothing was found lately are looked at less often: each look waits for a step.
  const int32_t num_skipped = state.acceptance.num_skipped();
  if (num_skipped > kLookInterval && num_skipped % kLookInterval != 0) return false;
  if (num_rows_for_drafts(state) == 0) return false;
  return std::ranges::any_of(state.running, [num_running](const auto& sequence) {
    return sequence->acceptance.is_due(num_running);
  });
}

void propose_drafts(EngineState& state) {
  if (state.limits.speculation == Speculation::kOff) return;
  const bool is_auto = state.limits.speculation == Speculation::kAuto;
  for (const auto& sequence : state.running) sequence->draft.clear();
  const auto num_running = static_cast<int32_t>(state.running.size());
  if (is_auto && num_running >= kMaxDraftingRows) return;
  const int32_t num_rows = num_rows_for_drafts(state);
  if (num_rows == 0) return;
  std::vector<Sequence*> drafting;
  const bool is_due = !is_auto || state.acceptance.is_due(num_running);
  for (const auto& owned : state.running) {
    Sequence& sequence = *owned;
    const bool has_newest = computes(sequence) && sequence.has_started();
    if (!has_newest || sequence.num_remaining() != 1) continue;
    const bool is_known = sequence.num_pending == 0;
    if (is_due && is_known && (!is_auto || sequence.acceptance.is_due(num_running))) {
      DraftIndex& texts = texts_of(*sequence.group);
      // The last draw that may count is the one at end_position - 1.
      const int32_t room = sequence.end_position - sequence.length() - 1;
      texts.extend(sequence.sample_index, response_of(sequence));
      texts.propose(sequence.sample_index,
                    std::min({state.limits.num_speculative_tokens, room, num_rows}),
                    sequence.draft);
    }
    if (sequence.draft.empty()) {
      sequence.acceptance.skip();
    } else {
      drafting.push_back(&sequence);
    }
  }
  if (drafting.empty()) {
    state.acceptance.skip();
  } else {
    fit_drafts(drafting, num_rows);
  }
}

void add_draft_rows(Sequence& sequence, EngineState& state, StepBatch& batch) {
  if (sequence.draft.empty()) return;
  const int32_t page_tokens = state.limits.page_tokens;
  const auto num_tokens = static_cast<int32_t>(sequence.draft.size());
  const auto num_held = static_cast<int32_t>(sequence.pages.size());
  const int32_t num_wanted = pages_for(sequence.length() + num_tokens, page_tokens) - num_held;
  // They come back when the step is settled, before anyone else asks for pages.
  const int32_t num_more = std::clamp(num_wanted, 0, state.pool.num_available());
  if (!state.try_allocate(num_more, sequence.pages)) fail_invariant("available pages are not");
  const int32_t num_covered = (num_held + num_more) * page_tokens - sequence.length();
  if (num_covered < num_tokens) sequence.draft.resize(static_cast<size_t>(num_covered));
  if (!sequence.draft.empty()) batch.add_draft(sequence, sequence.draft);
}

void settle_drafts(EngineState& state, StepBatch& batch, const kernels::StepResult& result) {
  for (StepBatch::Entry& entry : batch.entries) {
    if (entry.num_draft_tokens == 0 || entry.sequence == nullptr) continue;
    int32_t num_accepted = 0;
    for (int32_t i = 1; i <= entry.num_draft_tokens; ++i) {
      num_accepted += result.samples[static_cast<size_t>(entry.first_draw + i)].is_rejected ? 0 : 1;
    }
    Sequence& sequence = *entry.sequence;
    entry.num_tokens -= entry.num_draft_tokens - num_accepted;
    sequence.num_computed -= entry.num_draft_tokens - num_accepted;
    ++state.counters.num_drafts;
    state.counters.num_draft_tokens += entry.num_draft_tokens;
    state.counters.num_accepted_tokens += num_accepted;
    sequence.acceptance.learn(num_accepted, entry.num_draft_tokens);
    state.acceptance.learn(num_accepted, entry.num_draft_tokens);
    const int32_t num_kept = pages_for(sequence.num_computed, state.limits.page_tokens);
    while (static_cast<int32_t>(sequence.pages.size()) > num_kept) {
      state.pool.release(sequence.pages.back());
      sequence.pages.pop_back();
    }
  }
}

void remember_text(const EngineState& state, const Sequence& sequence) {
  Group* group = sequence.group.get();  // null: it is scored
  if (state.limits.speculation == Speculation::kOff || group == nullptr) return;
  if (group->request.key.group_size == 1) return;
  texts_of(*group).extend(sequence.sample_index, response_of(sequence));
}

}  // namespace rollpack::rollout
