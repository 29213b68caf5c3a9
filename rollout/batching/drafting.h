// Drafts in a continuous batch: when, for whom and how long, their rows, and what became of them.
// They change no result (kernels/step_plan.h); they cost rows, and pay where a step of a few rows
// more takes hardly longer, because it waits for the weights to stream from memory.
// Source: Leviathan et al., 2023; drafts from group siblings: Qin et al., "Seer", 2025.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/step_plan.h"
#include "rollout/engine/engine_state.h"
#include "rollout/engine/step_batch.h"

namespace rollpack::rollout {

// Rows of a step with drafts, while the processor would wait for weights to stream from memory. At
// 0.5B on two cores a step of 24 rows takes 1.06 x the time of one of 4; beyond, products count.
inline constexpr int32_t kMaxDraftingRows = 24;

// Whether someone may have a draft in the step about to be planned: all tokens must be known then.
bool may_propose_drafts(const EngineState& state);
// Fills the `draft` of running sequences for the step about to be planned.
void propose_drafts(EngineState& state);
// Cuts the longest drafts to one length, so that all of them together have `num_rows` rows at most:
// a lone sequence may use all of them, several share them. Rows that do not divide evenly go to the
// last of those that were cut. O(n log l) for n drafts of up to l rows.
void fit_drafts(std::span<Sequence* const> drafting, int32_t num_rows);
// Adds the sequence's draft behind its newest row, which was added and drawn from last; takes free
// pages for it, and shortens it where there are none.
void add_draft_rows(Sequence& sequence, EngineState& state, StepBatch& batch);
// Reads from the result which drafts came true: afterwards entries count the rows whose keys and
// values hold, and pages that only held other rows are free. Called before after_step().
void settle_drafts(EngineState& state, StepBatch& batch, const kernels::StepResult& result);
// Keeps what a finished sample said for the drafts of its siblings.
void remember_text(const EngineState& state, const Sequence& sequence);

}  // namespace rollpack::rollout
