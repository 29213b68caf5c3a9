// What a batching mode decides: which rows the next step computes. All modes give the same bits;
// they differ in what they compute.
#pragma once

#include <memory>
#include <string_view>

#include "rollout/engine/engine_state.h"
#include "rollout/engine/step_batch.h"

namespace rollpack::rollout {

class BatchingPolicy {
 public:
  virtual ~BatchingPolicy() = default;

  // Samples to have at hand, running and waiting, so that the engine stays full: half as many again
  // as can run, and no slot is empty for a round trip to rank 0.
  virtual int32_t num_wanted(const EngineLimits& limits) const {
    return limits.max_num_seqs + (limits.max_num_seqs + 1) / 2;
  }
  // Admits waiting sequences and fills `batch` with the rows of the next step; leaves it empty when
  // there is nothing to compute.
  virtual void plan(EngineState& state, StepBatch& batch) = 0;
  // Whether plan() may be called while a step is under way, whose results are not known: rows of it
  // count as computed, tokens it draws are pending, and nothing that is called for needs more.
  virtual bool can_plan_ahead(const EngineState&) const { return false; }
  // The step ran: every entry's rows now have keys and values. Called before its tokens are known.
  virtual void after_step(EngineState&, const StepBatch&) {}
  // Takes out of `running` what is finished and no step under way names, giving back its pages and
  // slot.
  virtual void retire(EngineState& state) = 0;
  // All running sequences go back to the queue with their keys and values forgotten.
  virtual void drop_kv(EngineState& state) = 0;
};

// Whether a mode profits from longest groups first. Modes that work in waves are defined over the
// order of submission: like lengths side by side would be another mode (length_sorted).
inline bool wants_longest_first(std::string_view batching) {
  return batching == "continuous";
}

// "continuous", "prepacked", "left_padded" or "length_sorted".
// Errors: invalid_argument, naming engine.batching.
std::unique_ptr<BatchingPolicy> make_batching_policy(std::string_view name);

}  // namespace rollpack::rollout
