// What a step may not do while another is under way, though backends run steps in order: begin anew
// what the other still writes. On a device whose copies and steps overlap it would be a race.
#pragma once

#include <cstdint>
#include <set>
#include <string>

#include "kernels/base/error.h"
#include "kernels/step_plan.h"

namespace rollpack::kernels::testing {

class StepOverlap {
 public:
  StepOverlap() = default;
  // Of a step that is under way from now on.
  StepOverlap(const StepPlan& plan, int32_t page_tokens) {
    for_each_row(plan, page_tokens, [this](int32_t page, int32_t) { written_.insert(page); });
    for (const PageCopy& copy : plan.page_copies) written_.insert(copy.target);
    for (const SampleRow& sample : plan.samples) drawing_.insert(sample.slot);
  }

  // Errors: a broken invariant where `next` starts a page that this step writes, or fills a slot
  // that it draws from.
  void check(const StepPlan& next, int32_t page_tokens) const {
    const auto refuse = [](const char* what, int32_t number) {
      fail_invariant(std::string(what) + " " + std::to_string(number) +
                     " of a step under way begins anew");
    };
    for_each_row(next, page_tokens, [&](int32_t page, int32_t offset) {
      if (offset == 0 && written_.contains(page)) refuse("page", page);
    });
    for (const PageCopy& copy : next.page_copies) {
      if (written_.contains(copy.target)) refuse("page", copy.target);
    }
    for (const SlotInit& init : next.slot_inits) {
      if (drawing_.contains(init.slot)) refuse("slot", init.slot);
    }
  }

 private:
  template <class Action>
  static void for_each_row(const StepPlan& plan, int32_t page_tokens, const Action& action) {
    for (const StepSequence& sequence : plan.sequences) {
      for (int32_t row = sequence.row_begin; row < sequence.row_begin + sequence.num_rows; ++row) {
        const int32_t position = plan.positions[static_cast<size_t>(row)];
        if (position == kPadPosition) continue;
        const int32_t entry = sequence.page_table_begin + position / page_tokens;
        action(plan.page_tables[static_cast<size_t>(entry)], position % page_tokens);
      }
    }
  }

  std::set<int32_t> written_;  // pages
  std::set<int32_t> drawing_;  // slots
};

}  // namespace rollpack::kernels::testing
