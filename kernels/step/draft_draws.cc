#include "kernels/step/draft_draws.h"

#include <algorithm>

namespace rollpack::kernels {

int32_t num_draws_before(const StepPlan& plan, size_t i) {
  size_t first = i;
  while (first > 0 && plan.samples[first - 1].slot == plan.samples[i].slot) --first;
  return static_cast<int32_t>(i - first);
}

bool is_draw_accepted(const StepPlan& plan, std::span<const HeadResult> samples, size_t i) {
  if (i == 0 || plan.samples[i - 1].slot != plan.samples[i].slot) return true;
  const HeadResult& before = samples[i - 1];
  return !before.is_rejected && before.is_finite && before.finish == SlotFinish::kRunning &&
         before.token == plan.input_ids[static_cast<size_t>(plan.samples[i].row)];
}

void find_failed_sequences(const StepPlan& plan, std::span<const uint8_t> row_failed,
                           StepResult& result) {
  result.failed_sequences.clear();
  if (std::ranges::find(row_failed, 1) == row_failed.end()) return;
  std::vector<uint8_t> row_rejected(row_failed.size(), 0);
  for (size_t i = 0; i < result.samples.size(); ++i) {
    if (result.samples[i].is_rejected) {
      row_rejected[static_cast<size_t>(plan.samples[i].row)] = 1;
    }
  }
  for (size_t s = 0; s < plan.sequences.size(); ++s) {
    const StepSequence& sequence = plan.sequences[s];
    for (int32_t row = sequence.row_begin; row < sequence.row_begin + sequence.num_rows; ++row) {
      const auto index = static_cast<size_t>(row);
      if (row_failed[index] != 0 && row_rejected[index] == 0) {
        result.failed_sequences.push_back(static_cast<int32_t>(s));
        break;
      }
    }
  }
}

}  // namespace rollpack::kernels
