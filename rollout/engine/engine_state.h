// What an engine has in hand: pages, slots, and the sequences waiting and running. The batching
// policies schedule over it; the engine applies results to it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "rollout/engine/sequence.h"
#include "rollout/engine/waiting_queue.h"
#include "rollout/kv_cache/page_pool.h"
#include "rollout/kv_cache/prefix_index.h"

namespace rollpack::rollout {

// Whether drafts are verified along with decoding rows. Changes no result.
enum class Speculation : uint8_t {
  kOff,
  kAuto,  // where few rows are active and drafts have been accepted lately
  kOn,    // wherever a draft is found and the step has room
};

struct EngineLimits {
  int32_t max_num_seqs = 256;
  int32_t max_num_batched_tokens = 2048;
  int32_t page_tokens = 16;
  int32_t num_pages = 0;
  int64_t page_bytes = 0;
  int64_t max_positions = 0;  // max_position_embeddings: a sequence ends with `length` there
  bool chunked_prefill = true;
  // A group's prompt is prefilled once for all its samples, and what was computed before under the
  // same weights is found again.
  bool prefix_sharing = true;
  bool wants_entropy = false;
  Speculation speculation = Speculation::kOff;
  int32_t num_speculative_tokens = 5;  // longest draft
};

struct EngineCounters {
  int64_t num_steps = 0;
  int64_t num_preemptions = 0;
  int64_t num_rows_computed = 0;  // pads included
  int64_t num_pad_rows = 0;
  // Planned before the stop of their sample was known: at most one a sample, drawn from in vain.
  int64_t num_rows_after_stop = 0;
  int64_t num_tokens_generated = 0;
  int64_t num_prompt_tokens = 0;  // of samples whose first token was drawn, cached ones included
  int64_t num_samples = 0;
  // Tokens of admitted sequences that the prefix index was asked for, and found there. Neither
  // counts a sibling that shares its leader's prompt, nor one that comes back after preemption.
  int64_t prefix_cache_queries = 0;
  int64_t prefix_cache_hits = 0;
  int64_t num_tokens_recomputed = 0;  // lost to preemption and not found in the prefix index
  double steps_s = 0;                 // wall time of all steps
  double scheduling_s = 0;            // of it, what is not the backend's: plan, apply, retire
  int64_t num_drafts = 0;
  int64_t num_draft_tokens = 0;
  int64_t num_accepted_tokens = 0;  // of the draft tokens; a draft's own draw is not counted
};

struct EngineState {
  explicit EngineState(const EngineLimits& engine_limits);

  // Gives back pages and slot.
  void release(Sequence& sequence);
  // Takes running[index] back to the queue, its keys and values forgotten.
  void requeue(size_t index);
  // The same for every running sequence that `is_chosen` says, in one pass.
  template <class IsChosen>
  void requeue_if(const IsChosen& is_chosen);
  // Puts a sequence into `waiting` by its arrival: what has waited longest comes first.
  void enqueue(std::unique_ptr<Sequence> sequence) { waiting.push(std::move(sequence)); }

  // Files the sequence's first `num_tokens` tokens, which must be computed, in the prefix index.
  void file(Sequence& sequence, int32_t num_tokens);
  // Appends `count` pages, evicting cached ones where none is free; or changes nothing and returns
  // false.
  bool try_allocate(int32_t count, std::vector<int32_t>& pages);

  EngineLimits limits;
  PagePool pool;
  PrefixIndex index;
  std::vector<int32_t> free_slots;
  WaitingQueue waiting;
  std::vector<std::unique_ptr<Sequence>> running;  // by admission
  int64_t weight_version = 0;
  bool admits = true;               // false: nothing new starts, what runs goes on
  int32_t num_steps_under_way = 0;  // submitted, their results not applied
  EngineCounters counters;
  Acceptance acceptance;  // of all sequences' drafts

 private:
  void return_to_queue(std::unique_ptr<Sequence> sequence);
};

template <class IsChosen>
void EngineState::requeue_if(const IsChosen& is_chosen) {
  std::erase_if(running, [&](std::unique_ptr<Sequence>& sequence) {
    if (!is_chosen(*sequence)) return false;
    return_to_queue(std::move(sequence));
    return true;
  });
}

}  // namespace rollpack::rollout
