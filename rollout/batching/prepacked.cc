#include "rollout/batching/prepacked.h"

#include <algorithm>

#include "kernels/base/error.h"
#include "rollout/batching/wave.h"
#include "trainer_bridge/packing/bin_packing.h"

namespace rollpack::rollout {

int32_t PrepackedBatching::num_wanted(const EngineLimits& limits) const {
  return 2 * limits.max_num_seqs;  // one wave runs, the next is there when it ends
}

void PrepackedBatching::plan(EngineState& state, StepBatch& batch) {
  if (state.running.empty()) choose_wave(state);
  if (column_ < num_columns_) {
    add_prompt_columns(state, batch);
    return;
  }
  for (const auto& sequence : state.running) {
    batch.add_rows(*sequence, 1);
    batch.add_sample(*sequence);
  }
}

void PrepackedBatching::choose_wave(EngineState& state) {
  const auto max_rows = static_cast<size_t>(max_wave_rows(state.limits));
  std::vector<Sequence*> chosen;
  int64_t num_pages = 0;
  for (Sequence* sequence : startable(state)) {
    // Room for the whole response at once, so that no sequence of a wave is ever preempted.
    num_pages += pages_for(sequence->end_position, state.limits.page_tokens);
    if (chosen.size() == max_rows || num_pages > state.pool.num_available()) break;
    chosen.push_back(sequence);
  }
  if (chosen.empty()) return;
  start_wave(state, chosen);
  for (Sequence* sequence : chosen) {
    const int32_t count = pages_for(sequence->end_position, state.limits.page_tokens);
    if (!state.try_allocate(count, sequence->pages)) {
      fail_invariant("KV pages that were counted as free are not");
    }
  }
  pack(chosen);
}

void PrepackedBatching::pack(const std::vector<Sequence*>& wave) {
  std::vector<int64_t> lengths;
  for (const Sequence* sequence : wave) lengths.push_back(sequence->num_remaining());
  column_ = 0;
  num_columns_ = static_cast<int32_t>(std::ranges::max(lengths));
  rows_.clear();
  for (const std::vector<int32_t>& bin : bridge::pack_best_fit_decreasing(lengths, num_columns_)) {
    Row row;
    int32_t begin = 0;
    for (const int32_t item : bin) {
      const int32_t end = begin + wave[item]->num_remaining();
      row.push_back({.sequence = wave[item], .begin = begin, .end = end});
      begin = end;
    }
    rows_.push_back(std::move(row));
  }
}

void PrepackedBatching::add_prompt_columns(const EngineState& state, StepBatch& batch) {
  const auto num_rows = static_cast<int32_t>(rows_.size());
  const int32_t num_columns = std::max(1, state.limits.max_num_batched_tokens / num_rows);
  const int32_t end = std::min(num_columns_, column_ + num_columns);
  for (const Row& row : rows_) add_columns(row, end, batch);
  column_ = end;
}

// Columns [column_, end) of one row.
void PrepackedBatching::add_columns(const Row& row, int32_t end, StepBatch& batch) const {
  for (const Segment& segment : row) {
    const int32_t from = std::max(segment.begin, column_), to = std::min(segment.end, end);
    if (from >= to) continue;
    if (segment.sequence->is_finished) {  // aborted while the wave's prompts were computed
      batch.add_pads(to - from);
      continue;
    }
    batch.add_rows(*segment.sequence, to - from);
    if (to == segment.end && !segment.sequence->is_score()) batch.add_sample(*segment.sequence);
  }
  batch.add_pads(end - std::max(column_, std::min(row.back().end, end)));
}

void PrepackedBatching::retire(EngineState& state) {
  // The rows point to their sequences while prompts are computed: those stay, finished or not.
  const bool is_prefilling = column_ < num_columns_;
  const auto is_live = [](const std::unique_ptr<Sequence>& s) { return !s->is_finished; };
  if (is_prefilling && std::ranges::any_of(state.running, is_live)) return;
  release_finished(state);
  rows_.clear();
  num_columns_ = column_ = 0;
}

void PrepackedBatching::drop_kv(EngineState& state) {
  requeue_wave(state);
  rows_.clear();
  num_columns_ = column_ = 0;
}

}  // namespace rollpack::rollout
