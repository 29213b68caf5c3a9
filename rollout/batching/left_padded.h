// The textbook baseline: waves of rows, prompts left-padded to the wave's longest, one column a
// step, finished rows kept until the wave ends. Pads and finished rows are really computed through
// every linear layer, every sample prefills its own copy of the prompt, and the cache is dense: a
// rectangle of consecutive pages, as many a row as the longest prompt and the longest response of
// the wave need. Masks, positions and places in the cache come from each sequence's own length, so
// a pad changes no bit of a real row.
//
// `length_sorted` is the same with prompts of like length in one wave: all that waits is sorted and
// cut into waves, and what comes later waits until those are done, so that a long prompt is not
// overtaken for ever. It needs to see many prompts before it starts.
// Source: the two baselines of Zhao et al., "Prepacking", AISTATS 2025.
#pragma once

#include "rollout/batching/batching_policy.h"

namespace rollpack::rollout {

class LeftPaddedBatching : public BatchingPolicy {
 public:
  enum class Order : uint8_t { kArrival, kLength };

  explicit LeftPaddedBatching(Order order) : order_(order) {}

  int32_t num_wanted(const EngineLimits& limits) const override;
  void plan(EngineState& state, StepBatch& batch) override;
  void retire(EngineState& state) override;
  void drop_kv(EngineState& state) override;

 private:
  std::vector<Sequence*> next_in_order(const EngineState& state);
  void choose_wave(EngineState& state);
  void add_prompt_columns(EngineState& state, StepBatch& batch);
  void add_next_column(EngineState& state, StepBatch& batch);

  const Order order_;
  uint64_t sorted_until_ = 0;  // kLength: arrivals below it were sorted together
  int32_t num_columns_ = 0;    // of the wave's prompts: its longest row
  int32_t column_ = 0;         // prompt columns computed so far
};

}  // namespace rollpack::rollout
