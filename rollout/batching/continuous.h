// Continuous batching with paged KV, the default: every step mixes decoding rows and prefill chunks
// under one token budget; sequences join and leave at any step; a group's prompt is prefilled once,
// and what was computed before under the same weights is found in the prefix index.
//
// When pages run out, the sequences with the fewest computed private tokens go back to the queue
// (the oldest last), where they keep their place: nobody younger overtakes. They return only with
// pages promised up to twice their length, so recomputation is bounded and nobody starves.
// Planning a step costs O(n log n) for n running sequences.
// Source: Yu et al., "Orca", OSDI 2022; Kwon et al., "PagedAttention", SOSP 2023.
#pragma once

#include "rollout/batching/batching_policy.h"

namespace rollpack::rollout {

class PagesUnderWay;

class ContinuousBatching : public BatchingPolicy {
 public:
  void plan(EngineState& state, StepBatch& batch) override;
  // Not where sequences have to be preempted or may have drafts: both look at all their tokens.
  bool can_plan_ahead(const EngineState& state) const override;
  void after_step(EngineState& state, const StepBatch& batch) override;
  void retire(EngineState& state) override;
  void drop_kv(EngineState& state) override;

 private:
  enum class Admission : uint8_t {
    kAdmitted,
    kDeferred,  // its next page is being computed: it will find it
    kNoRoom,
  };
  // Who could not be admitted, and with what: without more there is no need to look again.
  struct Blocked {
    uint64_t arrival = 0;
    int32_t num_spare = -1;
    uint64_t num_index_changes = 0;

    bool still_holds(const Blocked& now) const {
      return arrival == now.arrival && num_spare >= now.num_spare &&
             num_index_changes == now.num_index_changes;
    }
  };

  // Gives every computing sequence the pages for its known tokens, preempting where there are none.
  void secure_pages(EngineState& state, StepBatch& batch);
  void preempt(EngineState& state, int32_t num_wanted);
  void admit(EngineState& state, StepBatch& batch);
  // `num_spare`: pages that neither running sequences want nor may soon want.
  Admission try_admit(EngineState& state, Sequence& sequence, int32_t num_spare,
                      PagesUnderWay& under_way, StepBatch& batch);
  // Gives the sequence the cached pages its tokens begin with.
  Admission take_prefix(EngineState& state, Sequence& sequence, int32_t promised_end,
                        int32_t num_spare, const PagesUnderWay& under_way);
  void add_decoding_rows(EngineState& state, StepBatch& batch);
  void add_prefill_chunks(EngineState& state, StepBatch& batch);
  // Files what is computed of the prompt; once that is all of it, followers get its pages.
  void share_prompt(EngineState& state, Sequence& sequence);

  size_t first_row_ = 0;  // where decoding rows start when the budget holds fewer than there are
  Blocked blocked_;
};

}  // namespace rollpack::rollout
