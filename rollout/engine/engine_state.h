// What an engine has in hand: pages, slots, and the sequences waiting and running. The batching
// policies schedule over it; the engine applies results to it.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "rollout/engine/sequence.h"
#include "rollout/kv_cache/page_pool.h"

namespace rollpack::rollout {

struct EngineLimits {
  int32_t max_num_seqs = 256;
  int32_t max_num_batched_tokens = 2048;
  int32_t page_tokens = 16;
  int32_t num_pages = 0;
  int64_t page_bytes = 0;
  int64_t max_positions = 0;  // max_position_embeddings: a sequence ends with `length` there
  bool chunked_prefill = true;
  bool prefix_sharing = true;  // a group's prompt is prefilled once for all its samples
  bool wants_entropy = false;
};

struct EngineCounters {
  int64_t num_steps = 0;
  int64_t num_preemptions = 0;
  int64_t num_rows_computed = 0;  // pads included
  int64_t num_pad_rows = 0;
  int64_t num_tokens_generated = 0;
  int64_t num_samples = 0;
};

struct EngineState {
  explicit EngineState(const EngineLimits& engine_limits);

  // Gives back pages and slot.
  void release(Sequence& sequence);
  // Takes running[index] back to the queue, its keys and values forgotten.
  void requeue(size_t index);
  // Gives a group's pinned prompt pages back.
  void unpin(Group& group);
  // Puts a sequence into `waiting` by its arrival: what has waited longest comes first.
  void enqueue(std::unique_ptr<Sequence> sequence);

  EngineLimits limits;
  PagePool pool;
  std::vector<int32_t> free_slots;
  std::deque<std::unique_ptr<Sequence>> waiting;   // by arrival
  std::vector<std::unique_ptr<Sequence>> running;  // by admission
  std::map<uint64_t, Group*> pinned_prompts;       // by the group's arrival
  bool admits = true;                              // false: nothing new starts, what runs goes on
  EngineCounters counters;
};

}  // namespace rollpack::rollout
