// The textbook baseline: waves of rows, prompts left-padded to the wave's longest, one column a
// step, finished rows kept until the wave ends. Pads and finished rows are really computed through
// every linear layer, and every sample prefills its own copy of the prompt. Masks and positions
// come from lengths, so a pad changes no bit of a real row.
#pragma once

#include "rollout/batching/batching_policy.h"

namespace rollpack::rollout {

class LeftPaddedBatching : public BatchingPolicy {
 public:
  void plan(EngineState& state, StepBatch& batch) override;
  void after_step(EngineState& state, const StepBatch& batch) override;
  void retire(EngineState& state) override;
  void drop_kv(EngineState& state) override;

 private:
  void start_wave(EngineState& state);
  void add_prompt_columns(EngineState& state, StepBatch& batch);
  void add_next_column(EngineState& state, StepBatch& batch);

  int32_t num_columns_ = 0;  // of the wave's prompts: its longest row
  int32_t column_ = 0;       // prompt columns computed so far
};

}  // namespace rollpack::rollout
