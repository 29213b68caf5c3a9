// The rows of one step being put together: a StepPlan for the backend, and beside it which sequence
// each row and result belongs to.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/step_plan.h"
#include "rollout/engine/sequence.h"
#include "rollout/kv_cache/page_pool.h"

namespace rollpack::rollout {

class StepBatch {
 public:
  struct Entry {
    Sequence* sequence = nullptr;
    int32_t num_tokens = 0;   // real rows, pads not counted
    int32_t first_score = 0;  // scores [first_score, first_score + num_scores) are this sequence's
    int32_t num_scores = 0;
    // The last num_draft_tokens of its rows are guesses; their draws, and before them the draw of
    // the row they follow, are samples [first_draw, first_draw + num_draft_tokens].
    int32_t num_draft_tokens = 0;
    int32_t first_draw = 0;
  };

  void clear();
  bool empty() const { return plan.input_ids.empty(); }
  int32_t num_rows() const { return static_cast<int32_t>(plan.input_ids.size()); }

  // Rows for the next `num_tokens` uncomputed tokens of `sequence`, after `num_pads` pad rows. Its
  // pages must already cover them. Scored sequences get their score rows here.
  void add_rows(Sequence& sequence, int32_t num_tokens, int32_t num_pads = 0);
  // Rows that are pads only: a finished sequence of a dense wave.
  void add_pads(int32_t num_pads);
  // The step is under way: its rows count as computed, a token that it draws for a sequence stands
  // at the end of that one's tokens until its value is known. A sequence that shares its leader's
  // row and has no pages yet gets its token with the result.
  void begin();
  // The step has ended. Sequences that ended before are out of `entries` and `sampled` (null) from
  // here on. Returns how many rows were computed for some that had drawn a stop token.
  int32_t end();
  // Nobody waits for the step any more: what it was to compute is not computed.
  void give_up();
  // Draws the next token of `target` from row `row` (-1: the last one added), preparing its slot if
  // needed.
  void add_sample(Sequence& target, int32_t row = -1);
  // Guesses of the tokens behind the one just drawn by add_sample() from the last row added: a row
  // and a draw each. The sequence's pages must already cover them.
  void add_draft(Sequence& sequence, const std::vector<int32_t>& tokens);

  kernels::StepPlan plan;
  std::vector<Entry> entries;      // one a plan.sequences element
  std::vector<Sequence*> sampled;  // one a plan.samples element
  std::vector<Sequence*> copying;  // one a plan.page_copies element: whose page is written
  bool has_drafts = false;
};

// Makes the page of position `position` of `sequence` writable: allocates it where it is missing,
// copies it where others read it or its slots from there on are cached. Changes nothing and returns
// false when no page is free.
bool try_make_writable(Sequence& sequence, int32_t position, int32_t page_tokens, PagePool& pool,
                       std::vector<kernels::PageCopy>& copies);

// ceil(num_tokens / page_tokens)
inline int32_t pages_for(int64_t num_tokens, int32_t page_tokens) {
  return static_cast<int32_t>((num_tokens + page_tokens - 1) / page_tokens);
}

}  // namespace rollpack::rollout
