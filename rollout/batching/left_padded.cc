#include "rollout/batching/left_padded.h"

#include <algorithm>
#include <utility>

#include "kernels/base/error.h"
#include "rollout/batching/wave.h"

namespace rollpack::rollout {
namespace {

// Waves of prompts that `length_sorted` sorts together.
constexpr int32_t kSortedWaves = 64;

// `count` consecutive pages. Between waves no sequence holds one, and nothing is cached in this
// mode: take them all, keep the first.
std::vector<int32_t> take_consecutive(EngineState& state, size_t count) {
  std::vector<int32_t> pages;
  state.try_allocate(state.pool.num_available(), pages);
  std::ranges::sort(pages);
  const bool is_run =
      pages.size() >= count && pages[count - 1] == pages.front() + static_cast<int32_t>(count) - 1;
  if (!is_run) fail_invariant("a wave starts while KV pages are in use");
  for (size_t i = pages.size(); i-- > count;) state.pool.release(pages[i]);
  pages.resize(count);
  return pages;
}

}  // namespace

int32_t LeftPaddedBatching::num_wanted(const EngineLimits& limits) const {
  // One wave runs, the next is there when it ends.
  const int64_t num_waves = order_ == Order::kLength ? kSortedWaves : 2;
  return static_cast<int32_t>(std::min<int64_t>(num_waves * limits.max_num_seqs, 65536));
}

void LeftPaddedBatching::plan(EngineState& state, StepBatch& batch) {
  if (state.running.empty()) choose_wave(state);
  if (state.running.empty()) return;
  if (column_ < num_columns_) {
    add_prompt_columns(state, batch);
  } else {
    add_next_column(state, batch);
  }
}

std::vector<Sequence*> LeftPaddedBatching::next_in_order(const EngineState& state) {
  std::vector<Sequence*> sequences = startable(state);
  if (order_ == Order::kArrival || sequences.empty()) return sequences;
  if (sequences.front()->arrival >= sorted_until_) sorted_until_ = sequences.back()->arrival + 1;
  std::erase_if(sequences, [&](const Sequence* s) { return s->arrival >= sorted_until_; });
  std::ranges::stable_sort(sequences, {}, &Sequence::num_remaining);
  return sequences;
}

void LeftPaddedBatching::choose_wave(EngineState& state) {
  const int32_t page_tokens = state.limits.page_tokens;
  const auto max_rows = static_cast<size_t>(max_wave_rows(state.limits));
  num_columns_ = 0;
  column_ = 0;
  int32_t num_new_columns = 0;
  std::vector<Sequence*> chosen;
  for (Sequence* sequence : next_in_order(state)) {
    if (chosen.size() == max_rows) break;
    const int32_t num_prompt = std::max(num_columns_, sequence->num_remaining());
    const int32_t num_new = std::max(num_new_columns, sequence->end_position - sequence->length());
    // The cache is a dense rectangle: each row has room for the longest prompt and response.
    const int64_t row_pages = pages_for(int64_t{num_prompt} + num_new, page_tokens);
    const auto num_rows = static_cast<int64_t>(chosen.size()) + 1;
    if (num_rows > 1 && num_rows * row_pages > state.limits.num_pages) break;
    num_columns_ = num_prompt;
    num_new_columns = num_new;
    chosen.push_back(sequence);
  }
  if (chosen.empty()) return;
  start_wave(state, chosen);
  const int32_t row_pages = pages_for(int64_t{num_columns_} + num_new_columns, page_tokens);
  const std::vector<int32_t> pages = take_consecutive(state, chosen.size() * row_pages);
  for (size_t row = 0; row < state.running.size(); ++row) {
    const auto first = pages.begin() + static_cast<ptrdiff_t>(row * row_pages);
    state.running[row]->pages.assign(first, first + row_pages);
  }
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

void LeftPaddedBatching::retire(EngineState& state) {
  if (std::ranges::all_of(state.running, [](const auto& s) { return s->is_finished; })) {
    release_finished(state);
  }
}

void LeftPaddedBatching::drop_kv(EngineState& state) {
  requeue_wave(state);
}

}  // namespace rollpack::rollout
