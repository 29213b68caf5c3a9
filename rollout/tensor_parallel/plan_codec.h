// A step's plan as bytes, for other ranks of this host that run the same program: fields in order,
// numbers in the machine's order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/step_plan.h"

namespace rollpack::rollout {

// Appends the plan to `out`.
void encode_plan(const kernels::StepPlan& plan, std::vector<uint8_t>& out);

// Errors: data_loss where the bytes are not those of a plan.
kernels::StepPlan decode_plan(std::span<const uint8_t> bytes);

}  // namespace rollpack::rollout
