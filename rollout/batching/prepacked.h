// Prepacking: a wave's prompts are bin-packed into rows no longer than the longest of them, and
// those rows are computed column by column. Positions restart at each prompt and a token attends to
// its own prompt alone (block-diagonal); what a row has left over is padding and really computed.
// Keys and values go to each sequence's own pages, so nothing has to be cut out of the rows
// afterwards, and decoding computes live rows only. A wave ends before the next one starts.
//
// Every sample packs its own copy of the prompt, whatever engine.enable_prefix_caching says: the
// mode is here to be compared with left_padded, which does the same; sharing is `continuous`.
// Source: Zhao et al., "Prepacking", AISTATS 2025 (PMLR 258:4393).
#pragma once

#include <vector>

#include "rollout/batching/batching_policy.h"

namespace rollpack::rollout {

class PrepackedBatching : public BatchingPolicy {
 public:
  int32_t num_wanted(const EngineLimits& limits) const override;
  void plan(EngineState& state, StepBatch& batch) override;
  void retire(EngineState& state) override;
  void drop_kv(EngineState& state) override;

 private:
  // Uncomputed tokens of one sequence in columns [begin, end) of a packed row.
  struct Segment {
    Sequence* sequence = nullptr;
    int32_t begin = 0;
    int32_t end = 0;
  };
  using Row = std::vector<Segment>;  // one after the other from column 0

  void choose_wave(EngineState& state);
  void pack(const std::vector<Sequence*>& wave);
  void add_prompt_columns(const EngineState& state, StepBatch& batch);
  void add_columns(const Row& row, int32_t end, StepBatch& batch) const;

  std::vector<Row> rows_;    // of the wave's prompts
  int32_t num_columns_ = 0;  // the longest prompt of the wave
  int32_t column_ = 0;       // columns computed so far
};

}  // namespace rollpack::rollout
