// Random steps that only decode, over pages that one prompt has filled: any page table is as good
// as any other where only bits are compared. Contexts cross chunks of 256, some rows share chunks.
#pragma once

#include <algorithm>
#include <vector>

#include "tests/kernels/tiny_model.h"

namespace rollpack::kernels::testing {

class DecodingSteps {
 public:
  static constexpr int32_t kPromptPages = 17;  // 272 tokens
  static constexpr int32_t kOwnPages = 2;      // of a row, behind those
  static int32_t num_pages(int32_t max_rows) { return kPromptPages + kOwnPages * max_rows; }

  explicit DecodingSteps(uint64_t seed) : numbers_(seed) {}

  // Fills the pages that contexts are made of.
  static StepPlan prefill(int64_t V) {
    StepPlan plan;
    add_sequence(plan, Numbers(3).ids(kPromptPages * 16, V), 0, page_range(0, kPromptPages));
    return plan;
  }

  // Slots [0, rows) are filled and draw their first token.
  StepPlan first(int32_t rows, int64_t V) {
    StepPlan plan{.wants_entropy = numbers_.below(2) == 0};
    tables_.clear();
    positions_.clear();
    const std::vector<int32_t> order = numbers_.permutation(rows);
    for (int32_t row = 0; row < rows; ++row) {
      const int32_t position = next_position();
      const int32_t own = kPromptPages + kOwnPages * row;
      std::vector<int32_t> table;
      const bool is_sibling = row > 0 && numbers_.below(2) == 0;
      for (int32_t page = 0; page < position / 16; ++page) {
        const bool has_same = is_sibling && page < static_cast<int32_t>(tables_.back().size()) - 2;
        table.push_back(has_same ? tables_.back()[static_cast<size_t>(page)]
                                 : numbers_.below(kPromptPages));
      }
      if (position % 16 > 0) {
        plan.page_copies.push_back({numbers_.below(kPromptPages), own, position % 16});
      }
      table.insert(table.end(), {own, own + 1});
      add_sequence(plan, numbers_.ids(1, V), position, table, row);
      plan.slot_inits.push_back(slot_init(row, position));
      tables_.push_back(std::move(table));
      positions_.push_back(position);
    }
    for (const int32_t row : order) plan.samples.push_back({row, row});
    return plan;
  }

  // The next token of `slots`, which have drawn, in this order.
  StepPlan next(const std::vector<int32_t>& slots) {
    StepPlan plan{.wants_entropy = numbers_.below(2) == 0};
    for (const int32_t slot : slots) {
      const auto index = static_cast<size_t>(slot);
      add_sequence(plan, {kPendingToken}, ++positions_[index], tables_[index], slot);
      plan.samples.push_back({static_cast<int32_t>(plan.num_rows()) - 1, slot});
    }
    return plan;
  }

 private:
  int32_t next_position() {
    const std::vector<int32_t> edges = {0, 1, 15, 16, 254, 255, 256, 257, 271, 480};
    return numbers_.below(2) == 0 ? edges[static_cast<size_t>(numbers_.below(10))]
                                  : numbers_.below(490);
  }

  SlotInit slot_init(int32_t slot, int32_t position) {
    const std::vector<SamplingParams> all = {{},
                                             {.temperature = 0},
                                             {.temperature = 0.7f, .top_p = 0.9f},
                                             {.top_k = 20},
                                             {.temperature = 1.2f, .min_p = 0.05f}};
    SlotInit init{.slot = slot,
                  .sampling = all[static_cast<size_t>(numbers_.below(5))],
                  .seed = 11,
                  .prompt_hash = numbers_.next(),
                  .sample_index = static_cast<uint32_t>(slot),
                  .next_position = position + 1,
                  .end_position = position + (numbers_.below(6) == 0 ? 2 : 100)};
    if (numbers_.below(3) == 0) {
      init.stop_token_ids = {4, 70, 900};
      init.min_position = position + 2;
    }
    return init;
  }

  Numbers numbers_;
  std::vector<std::vector<int32_t>> tables_;  // [slots]
  std::vector<int32_t> positions_;            // [slots] of the last row
};

}  // namespace rollpack::kernels::testing
