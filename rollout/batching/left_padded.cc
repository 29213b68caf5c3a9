#include "rollout/batching/left_padded.h"

#include <algorithm>
#include <utility>

namespace rollpack::rollout {

void LeftPaddedBatching::plan(EngineState& state, StepBatch& batch) {
  if (state.running.empty()) start_wave(state);
  if (state.running.empty()) return;
  if (column_ < num_columns_) {
    add_prompt_columns(state, batch);
  } else {
    add_next_column(state, batch);
  }
}

void LeftPaddedBatching::start_wave(EngineState& state) {
  const int32_t page_tokens = state.limits.page_tokens;
  const auto max_rows =
      static_cast<size_t>(std::min(state.limits.max_num_seqs, state.limits.max_num_batched_tokens));
  num_columns_ = 0;
  column_ = 0;
  int32_t num_new_columns = 0;
  while (!state.waiting.empty() && state.running.size() < max_rows) {
    Sequence& sequence = *state.waiting.front();
    if (!state.admits && !sequence.has_started()) break;
    const int32_t num_prompt = std::max(num_columns_, sequence.num_remaining());
    const int32_t num_new = std::max(num_new_columns, sequence.end_position - sequence.length());
    // The cache is a dense rectangle: each row has room for the longest prompt and response.
    const int64_t row_pages = pages_for(int64_t{num_prompt} + num_new, page_tokens);
    const auto num_rows = static_cast<int64_t>(state.running.size()) + 1;
    if (num_rows > 1 && num_rows * row_pages > state.limits.num_pages) break;
    num_columns_ = num_prompt;
    num_new_columns = num_new;
    sequence.slot = state.free_slots.back();
    state.free_slots.pop_back();
    state.running.push_back(state.waiting.take(sequence));
  }
  const int32_t row_pages = pages_for(int64_t{num_columns_} + num_new_columns, page_tokens);
  for (const auto& sequence : state.running) state.pool.try_allocate(row_pages, sequence->pages);
}

void LeftPaddedBatching::add_prompt_columns(EngineState& state, StepBatch& batch) {
  const auto num_rows = static_cast<int32_t>(state.running.size());
  const int32_t end =
      std::min(num_columns_, column_ + std::max(1, state.limits.max_num_batched_tokens / num_rows));
  for (const auto& sequence : state.running) {
    if (sequence->is_finished) {  // aborted while the wave's prompts were computed
      batch.add_pads(end - column_);
      continue;
    }
    // Column of the row's first token: everything before it is padding.
    const int32_t first = num_columns_ - sequence->num_computed - sequence->num_remaining();
    const int32_t num_pads = std::clamp(first, column_, end) - column_;
    const int32_t num_tokens = end - column_ - num_pads;
    if (num_tokens == 0) {
      batch.add_pads(num_pads);
      continue;
    }
    batch.add_rows(*sequence, num_tokens, num_pads);
    if (end == num_columns_ && !sequence->is_score()) batch.add_sample(*sequence);
  }
  column_ = end;
}

void LeftPaddedBatching::add_next_column(EngineState& state, StepBatch& batch) {
  for (const auto& sequence : state.running) {
    if (sequence->is_finished) {
      batch.add_pads(1);
    } else {
      batch.add_rows(*sequence, 1);
      batch.add_sample(*sequence);
    }
  }
}

void LeftPaddedBatching::after_step(EngineState&, const StepBatch& batch) {
  for (const StepBatch::Entry& entry : batch.entries) {
    if (entry.sequence != nullptr) entry.sequence->num_computed += entry.num_tokens;
  }
}

void LeftPaddedBatching::retire(EngineState& state) {
  for (const auto& sequence : state.running) {
    if (!sequence->is_finished) return;
  }
  for (const auto& sequence : state.running) state.release(*sequence);
  state.running.clear();
}

void LeftPaddedBatching::drop_kv(EngineState& state) {
  for (size_t i = state.running.size(); i-- > 0;) {
    if (!state.running[i]->is_finished) {
      state.requeue(i);
    } else {
      state.release(*state.running[i]);
    }
  }
  state.running.clear();
}

}  // namespace rollpack::rollout
