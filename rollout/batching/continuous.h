// Continuous batching with paged KV, the default: every step mixes decoding rows and prefill chunks
// under one token budget; sequences join and leave at any step; a group's prompt is prefilled once.
// Source: Yu et al., "Orca", OSDI 2022; Kwon et al., "PagedAttention", SOSP 2023.
#pragma once

#include "rollout/batching/batching_policy.h"

namespace rollpack::rollout {

class ContinuousBatching : public BatchingPolicy {
 public:
  void plan(EngineState& state, StepBatch& batch) override;
  void after_step(EngineState& state, const StepBatch& batch) override;
  void retire(EngineState& state) override;
  void drop_kv(EngineState& state) override;

 private:
  // Gives every decoding row a page it may write, preempting where pages run out.
  void secure_pages(EngineState& state, StepBatch& batch);
  // Sends followers whose leader is gone back to the queue; one of them will lead.
  void requeue_orphans(EngineState& state);
  void admit(EngineState& state, StepBatch& batch);
  bool try_admit(EngineState& state, Sequence& sequence, StepBatch& batch);
  void add_decoding_rows(EngineState& state, StepBatch& batch);
  void add_prefill_chunks(EngineState& state, StepBatch& batch);

  size_t first_row_ = 0;  // where decoding rows start when the budget holds fewer than there are
};

}  // namespace rollpack::rollout
