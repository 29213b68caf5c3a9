#include "kernels/cpu/step_context.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <span>

#include "kernels/base/error.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/step/check_plan.h"

namespace rollpack::kernels::cpu {

int32_t attention_rows_per_tile(const ModelShape& shape) {
  return static_cast<int32_t>(std::max<int64_t>(1, 64 / (shape.H / shape.G)));
}

StepContext::StepContext(const ModelShape& shape, const BackendOptions& options, int32_t num_pages)
    : slots(static_cast<size_t>(options.max_num_seqs)),
      shape_(shape),
      options_(options),
      num_pages_(num_pages),
      rows_per_tile_(attention_rows_per_tile(shape)) {}

void StepContext::begin(const StepPlan& plan) {
  check_plan(plan,
             {.V = shape_.V,
              .max_rows = options_.max_num_batched_tokens,
              .num_pages = num_pages_,
              .page_tokens = kPageTokens,
              .num_slots = options_.max_num_seqs},
             [this](int32_t index) -> SlotStatus {
               const Slot& slot = slots[static_cast<size_t>(index)];
               return {.is_set = slot.is_set, .has_pending = slot.pending_token != kPendingToken};
             });
  plan_ = &plan;
  for (const SlotInit& init : plan.slot_inits) {
    Slot& slot = slots[static_cast<size_t>(init.slot)];
    slot.init = init;
    slot.is_set = true;
    slot.pending_token = kPendingToken;
    slot.next_position = init.next_position;
    slot.is_finished = false;
  }
  derive_rows();
  derive_tiles();
  derive_head_rows();
  row_failed.assign(static_cast<size_t>(plan.num_rows()), 0);
  result = {};
}

void StepContext::derive_rows() {
  row_sequence.assign(static_cast<size_t>(plan_->num_rows()), 0);
  live_rows.clear();
  pad_rows.clear();
  tile_parts.clear();
  for (size_t s = 0; s < plan_->sequences.size(); ++s) {
    const StepSequence& sequence = plan_->sequences[s];
    const auto first_live = static_cast<int32_t>(live_rows.size());
    for (int32_t row = sequence.row_begin; row < sequence.row_begin + sequence.num_rows; ++row) {
      row_sequence[static_cast<size_t>(row)] = static_cast<int32_t>(s);
      const bool is_pad = plan_->positions[static_cast<size_t>(row)] == kPadPosition;
      (is_pad ? pad_rows : live_rows).push_back(row);
    }
    const auto end = static_cast<int32_t>(live_rows.size());
    for (int32_t begin = first_live; begin < end; begin += rows_per_tile_) {
      const int32_t first_row = live_rows[static_cast<size_t>(begin)];
      tile_parts.push_back({.sequence = static_cast<int32_t>(s),
                            .begin = begin,
                            .num_rows = std::min(rows_per_tile_, end - begin),
                            .first_position = plan_->positions[static_cast<size_t>(first_row)]});
    }
  }
}

// Leading pages that two parts' sequences have in common and that both parts see whole.
int32_t StepContext::common_pages(const TilePart& a, const TilePart& b) const {
  const auto table_of = [this](const TilePart& part) {
    const StepSequence& sequence = plan_->sequences[static_cast<size_t>(part.sequence)];
    const int32_t whole = std::min(sequence.num_pages, (part.first_position + 1) / kPageTokens);
    return std::span(plan_->page_tables)
        .subspan(static_cast<size_t>(sequence.page_table_begin), static_cast<size_t>(whole));
  };
  const auto pages = table_of(a);
  return static_cast<int32_t>(std::ranges::mismatch(pages, table_of(b)).in1 - pages.begin());
}

// Parts go into one tile while they fit and have most of the tile's shared pages in common:
// siblings of a group do, sequences that only begin alike do so among themselves.
void StepContext::derive_tiles() {
  const auto table_begin = [this](const TilePart& part) {
    const StepSequence& sequence = plan_->sequences[static_cast<size_t>(part.sequence)];
    return plan_->page_tables.data() + sequence.page_table_begin;
  };
  // By page tables, so that those with the longest common beginnings are neighbours.
  std::stable_sort(tile_parts.begin(), tile_parts.end(), [&](const auto& a, const auto& b) {
    const auto num_pages = [&](const TilePart& part) {
      return plan_->sequences[static_cast<size_t>(part.sequence)].num_pages;
    };
    return std::lexicographical_compare(table_begin(a), table_begin(a) + num_pages(a),
                                        table_begin(b), table_begin(b) + num_pages(b));
  });
  tiles.clear();
  for (size_t i = 0; i < tile_parts.size(); ++i) {
    const TilePart& part = tile_parts[i];
    const int32_t last = part.first_position + part.num_rows - 1;
    if (!tiles.empty() && tiles.back().num_rows + part.num_rows <= rows_per_tile_) {
      AttentionTile& tile = tiles.back();
      const int32_t common = std::min(
          common_pages(tile_parts[i - 1], part),
          tile.num_parts == 1 ? std::numeric_limits<int32_t>::max() : tile.num_shared_pages);
      if (common > 0 && (tile.num_parts == 1 || 2 * common >= tile.num_shared_pages)) {
        ++tile.num_parts;
        tile.num_rows += part.num_rows;
        tile.num_shared_pages = common;
        tile.last_position = std::max(tile.last_position, last);
        continue;
      }
    }
    tiles.push_back({.first_part = static_cast<int32_t>(i),
                     .num_parts = 1,
                     .num_rows = part.num_rows,
                     .last_position = last});
  }
  // Tiles that see most keys first, so that no thread is left with a long one at the end.
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const auto& a, const auto& b) { return a.last_position > b.last_position; });
}

void StepContext::derive_head_rows() {
  head_rows.clear();
  for (const SampleRow& sample : plan_->samples) head_rows.push_back(sample.row);
  for (const ScoreRow& score : plan_->scores) head_rows.push_back(score.row);
  std::sort(head_rows.begin(), head_rows.end());
  head_rows.erase(std::unique(head_rows.begin(), head_rows.end()), head_rows.end());
  const auto index_of = [this](int32_t row) {
    return static_cast<int32_t>(std::lower_bound(head_rows.begin(), head_rows.end(), row) -
                                head_rows.begin());
  };
  sample_head_row.clear();
  score_head_row.clear();
  for (const SampleRow& sample : plan_->samples) sample_head_row.push_back(index_of(sample.row));
  for (const ScoreRow& score : plan_->scores) score_head_row.push_back(index_of(score.row));
}

const StepPlan& StepContext::plan() const {
  if (plan_ == nullptr) fail_invariant("ops are called by a step's program only");
  return *plan_;
}

int32_t StepContext::token(int64_t row) const {
  const int32_t token = plan_->input_ids[static_cast<size_t>(row)];
  if (token != kPendingToken) return token;
  const auto s = static_cast<size_t>(row_sequence[static_cast<size_t>(row)]);
  return slots[static_cast<size_t>(plan_->sequences[s].slot)].pending_token;
}

int32_t StepContext::page_of(int64_t row) const {
  const auto index = static_cast<size_t>(row);
  const StepSequence& sequence = plan_->sequences[static_cast<size_t>(row_sequence[index])];
  return plan_->page_tables[static_cast<size_t>(sequence.page_table_begin +
                                                plan_->positions[index] / kPageTokens)];
}

void StepContext::fail_row(int64_t row) {
  // Relaxed: read after the loop's end, which orders everything.
  std::atomic_ref<uint8_t>(row_failed[static_cast<size_t>(row)])
      .store(1, std::memory_order_relaxed);
}

}  // namespace rollpack::kernels::cpu
