// What one step did, for whoever measures: which tokens it computed that nothing had computed
// before, what it drew, how long the backend took.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rollout/engine/step_batch.h"

namespace rollpack::rollout {

struct StepWork {
  // Positions [begin, end) of a sequence whose rows no earlier step has computed, of its own or, in
  // a prompt, of a sibling. `pages` is the sequence's page table.
  struct Span {
    int32_t begin = 0;
    int32_t end = 0;
    std::span<const int32_t> pages;
  };
  // Tokens that the sample of this arrival number has gained.
  struct Draw {
    uint64_t arrival = 0;
    int32_t num_tokens = 0;
    bool is_last = false;
  };

  double compute_s = 0;        // from handing the plan over to having its result
  int64_t num_rows = 0;        // pads, recomputation and rejected drafts included
  int32_t num_pages_used = 0;  // of the pool, while the step ran
  int64_t num_scored = 0;
  std::vector<Span> spans;
  std::vector<Draw> draws;
};

// Told of every step when its results are applied and nothing is given back yet; `work` is valid
// during the call.
class StepObserver {
 public:
  virtual ~StepObserver() = default;
  virtual void on_step(const StepWork& work) = 0;
};

// Fills spans, draws and num_scored from a batch whose results are applied, and notes in its
// sequences and groups what has been told, so that nothing is told twice.
void describe_step(const StepBatch& batch, StepWork& work);

}  // namespace rollpack::rollout
