// Drafts in a continuous batch: when, for whom and how long, their rows, and what became of them.
// They change no result (kernels/step_plan.h); they cost rows, and pay where a step of a few rows
// more takes hardly longer, because it waits for the weights to stream from memory.
// Source: Leviathan et al., 2023; drafts from group siblings: Qin et al., "Seer", 2025.
#pragma once

#include "kernels/step_plan.h"
#include "rollout/engine/engine_state.h"
#include "rollout/engine/step_batch.h"

namespace rollpack::rollout {

// Rows of a step with drafts: one pass of the 6-row matrix kernel over weights that stream from
// memory, while the processor would wait. More rows need a second pass: on a Zen 4 with two cores 4
// rows take 1.0 x, 6 rows 1.07 x, 8 rows 1.25 to 1.54 x, 16 rows 2.4 x the time of one.
inline constexpr int32_t kMaxDraftingRows = 6;

// Fills the `draft` of running sequences for the step about to be planned.
void propose_drafts(EngineState& state);
// Adds the sequence's draft behind its newest row, which was added and drawn from last; takes free
// pages for it, and shortens it where there are none.
void add_draft_rows(Sequence& sequence, EngineState& state, StepBatch& batch);
// Reads from the result which drafts came true: afterwards entries count the rows whose keys and
// values hold, and pages that only held other rows are free. Called before after_step().
void settle_drafts(EngineState& state, StepBatch& batch, const kernels::StepResult& result);
// Keeps what a finished sample said for the drafts of its siblings.
void remember_text(const EngineState& state, const Sequence& sequence);

}  // namespace rollpack::rollout
