#include "rollout/engine/step_batch.h"

#include <algorithm>
#include <utility>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"

namespace rollpack::rollout {

using kernels::kPadPosition;
using kernels::kPendingToken;

void StepBatch::clear() {
  plan = {};
  entries.clear();
  sampled.clear();
  copying.clear();
  has_drafts = false;
}

void StepBatch::add_rows(Sequence& sequence, int32_t num_tokens, int32_t num_pads) {
  const int32_t row_begin = num_rows();
  add_pads(num_pads);
  if (num_pads > 0) {  // the pads open this sequence's rows instead of standing alone
    plan.sequences.pop_back();
    entries.pop_back();
  }
  const int32_t first = sequence.num_computed;
  // A running sample's newest token lives in its slot: the host need not know it.
  const bool is_pending = sequence.slot_is_set && sequence.num_response() > 0;
  for (int32_t i = 0; i < num_tokens; ++i) {
    const int32_t position = first + i;
    const bool is_last_token = position == sequence.length() - 1;
    plan.input_ids.push_back(is_pending && is_last_token ? kPendingToken
                                                         : sequence.tokens[position]);
    plan.positions.push_back(position);
  }
  Entry entry{.sequence = &sequence,
              .num_tokens = num_tokens,
              .first_score = static_cast<int32_t>(plan.scores.size())};
  if (sequence.is_score()) {
    const float temperature = sequence.score->sequence.temperature;
    for (int32_t position = std::max(first, sequence.num_prompt - 1); position < first + num_tokens;
         ++position) {
      plan.scores.push_back({.row = row_begin + num_pads + position - first,
                             .token = sequence.tokens[position + 1],
                             .temperature = temperature});
    }
    entry.num_scores = static_cast<int32_t>(plan.scores.size()) - entry.first_score;
  }
  plan.sequences.push_back({.slot = sequence.slot,
                            .row_begin = row_begin,
                            .num_rows = num_pads + num_tokens,
                            .page_table_begin = static_cast<int32_t>(plan.page_tables.size()),
                            .num_pages = static_cast<int32_t>(sequence.pages.size())});
  plan.page_tables.insert(plan.page_tables.end(), sequence.pages.begin(), sequence.pages.end());
  entries.push_back(entry);
}

void StepBatch::add_pads(int32_t num_pads) {
  if (num_pads == 0) return;
  plan.sequences.push_back({.row_begin = num_rows(),
                            .num_rows = num_pads,
                            .page_table_begin = static_cast<int32_t>(plan.page_tables.size())});
  entries.push_back({});
  plan.input_ids.insert(plan.input_ids.end(), num_pads, 0);  // any id: nothing reads its result
  plan.positions.insert(plan.positions.end(), num_pads, kPadPosition);
}

void StepBatch::add_sample(Sequence& target, int32_t row) {
  if (!target.slot_is_set) {
    const GroupRequest& request = target.group->request;
    const RequestSampling& sampling = request.sampling;
    plan.slot_inits.push_back({.slot = target.slot,
                               .sampling = sampling.params,
                               .seed = sampling.seed,
                               .prompt_hash = fnv1a64(request.key.prompt_id.text),
                               .sample_index = static_cast<uint32_t>(target.sample_index),
                               .next_position = target.length(),
                               .min_position = target.num_prompt + sampling.min_tokens,
                               .end_position = target.end_position,
                               .stop_token_ids = request.ignores_stops ? std::vector<int32_t>{}
                                                                       : sampling.stop_token_ids});
    target.slot_is_set = true;
  }
  plan.samples.push_back({.row = row < 0 ? num_rows() - 1 : row, .slot = target.slot});
  sampled.push_back(&target);
}

void StepBatch::begin() {
  for (const Entry& entry : entries) {
    if (entry.sequence == nullptr) continue;
    ++entry.sequence->num_uses_under_way;
    entry.sequence->num_computed += entry.num_tokens;
    entry.sequence->num_rows_under_way += entry.num_tokens;
  }
  for (Sequence* sequence : copying) ++sequence->num_uses_under_way;
  const Sequence* last = nullptr;
  for (Sequence* sequence : sampled) {
    ++sequence->num_uses_under_way;
    // Draws behind the first are of a draft, and may not count.
    if (std::exchange(last, sequence) == sequence || sequence->pages.empty()) continue;
    sequence->tokens.push_back(kPendingToken);
    ++sequence->num_pending;
  }
}

int32_t StepBatch::end() {
  int32_t num_rows_after_stop = 0;
  for (Entry& entry : entries) {
    if (entry.sequence == nullptr) continue;
    Sequence& sequence = *entry.sequence;
    --sequence.num_uses_under_way;
    if (!sequence.is_finished) {
      sequence.num_rows_under_way -= entry.num_tokens;
      continue;
    }
    if (sequence.stop_token_id >= 0) num_rows_after_stop += entry.num_tokens;
    entry.sequence = nullptr;
  }
  for (Sequence*& sequence : sampled) {
    --sequence->num_uses_under_way;
    if (sequence->is_finished) sequence = nullptr;
  }
  for (Sequence* sequence : copying) --sequence->num_uses_under_way;
  return num_rows_after_stop;
}

void StepBatch::give_up() {
  const auto forget = [](Sequence* sequence) {
    if (sequence == nullptr) return;
    --sequence->num_uses_under_way;
    sequence->forget_steps_under_way();
  };
  for (const Entry& entry : entries) forget(entry.sequence);
  for (Sequence* sequence : sampled) forget(sequence);
  for (Sequence* sequence : copying) forget(sequence);
}

void StepBatch::add_draft(Sequence& sequence, const std::vector<int32_t>& tokens) {
  Entry& entry = entries.back();
  if (entry.sequence != &sequence || sampled.empty() || sampled.back() != &sequence) {
    fail_invariant("a draft does not follow a draw of its sequence");
  }
  entry.first_draw = static_cast<int32_t>(plan.samples.size()) - 1;
  entry.num_draft_tokens = static_cast<int32_t>(tokens.size());
  has_drafts = true;
  entry.num_tokens += entry.num_draft_tokens;
  kernels::StepSequence& rows = plan.sequences.back();
  rows.num_rows += entry.num_draft_tokens;
  // Pages that came for the draft; the table of the sequence added last is the last one.
  plan.page_tables.insert(plan.page_tables.end(), sequence.pages.begin() + rows.num_pages,
                          sequence.pages.end());
  rows.num_pages = static_cast<int32_t>(sequence.pages.size());
  for (const int32_t token : tokens) {
    plan.input_ids.push_back(token);
    plan.positions.push_back(plan.positions.back() + 1);
    add_sample(sequence);
  }
}

bool try_make_writable(Sequence& sequence, int32_t position, int32_t page_tokens, PagePool& pool,
                       std::vector<kernels::PageCopy>& copies) {
  const size_t index = position / page_tokens;
  if (index > sequence.pages.size()) fail_invariant("a page table has a hole");
  if (index == sequence.pages.size()) return pool.try_allocate(1, sequence.pages);
  const int32_t page = sequence.pages[index];
  if (pool.is_writable(page, position % page_tokens)) return true;
  std::vector<int32_t> fresh;
  if (!pool.try_allocate(1, fresh)) return false;
  if (const int32_t num_tokens = position % page_tokens; num_tokens > 0) {
    copies.push_back({.source = page, .target = fresh[0], .num_tokens = num_tokens});
  }
  pool.release(page);
  sequence.pages[index] = fresh[0];
  return true;
}

}  // namespace rollpack::rollout
