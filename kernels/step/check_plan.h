// Everything a plan can get wrong, found before the step changes anything.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels/step_plan.h"

namespace rollpack::kernels {

// What a plan may name.
struct PlanLimits {
  int64_t V = 0;
  int32_t max_rows = 0;
  int32_t num_pages = 0;
  int32_t page_tokens = 0;
  int32_t num_slots = 0;
};

// What matters of a sequence slot before the step.
struct SlotStatus {
  bool is_set = false;       // filled by an earlier step
  bool has_pending = false;  // has sampled a token that a row may stand for
};

// `slot_status` is asked for slots [0, num_slots).
// Errors: invalid_argument naming the entry of the plan, its value and what is allowed.
void check_plan(const StepPlan& plan, const PlanLimits& limits,
                const std::function<SlotStatus(int32_t slot)>& slot_status);

}  // namespace rollpack::kernels
