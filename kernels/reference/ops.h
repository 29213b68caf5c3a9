// The ops of backend.h in f64 with plain loops: what the fast backends are compared with.
// Inputs are read as stored, sums run in ascending order, results are rounded once when written.
#pragma once

#include <vector>

#include "kernels/backend.h"
#include "kernels/reference/step_state.h"
#include "kernels/reference/weights.h"

namespace rollpack::kernels::reference {

void embed(const StepState& step, const Weight& weight, const Tensor& out);
void rms_norm(const Weight& weight, const RmsNormArgs& args);
void linear(const Weight& weight, const Weight* bias, const LinearArgs& args);
// Sets step.row_failed of rows whose K or V is not finite once rounded.
void rope_append(StepState& step, const ModelShape& shape, const Weight* q_norm,
                 const Weight* k_norm, const RopeAppendArgs& args, KvPages& pages);
// `scores` is scratch for the longest sequence's keys.
void attention(const StepState& step, const ModelShape& shape, const AttentionArgs& args,
               KvPages& pages, std::vector<double>& scores);
void gather_head_rows(const StepState& step, const GatherHeadRowsArgs& args);
// logits[v] = sum over d of row[d] * weight[v][d], for row `row` of `in`.
void vocabulary_logits(const Weight& weight, const Tensor& in, int64_t row,
                       std::vector<double>& logits);

}  // namespace rollpack::kernels::reference
