// Steps that draw from one slot more than once (drafts, step_plan.h): at which position each draw
// is, and which of them count. Shared by the backends that compute on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/step_plan.h"

namespace rollpack::kernels {

// Draws of the same slot before plan.samples[i], in a checked plan: it draws at the slot's next
// position plus this.
int32_t num_draws_before(const StepPlan& plan, size_t i);

// Whether plan.samples[i] counts; `samples` has the results, finish included, of the draws before.
bool is_draw_accepted(const StepPlan& plan, std::span<const HeadResult> samples, size_t i);

// Fills result.failed_sequences from the rows whose K or V was not finite. A wrong draft may fail
// where the sequence itself would not.
//   row_failed  [T]  u8
void find_failed_sequences(const StepPlan& plan, std::span<const uint8_t> row_failed,
                           StepResult& result);

}  // namespace rollpack::kernels
