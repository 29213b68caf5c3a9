// What one running step knows besides its weights: its rows, its slots and its KV pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/backend.h"

namespace rollpack::kernels::reference {

// A sequence's sampling state between steps.
struct Slot {
  bool is_set = false;
  SlotInit init;
  int32_t next_position = 0;
  int32_t token = kPendingToken;  // the one sampled last; kPendingToken before the first
  bool is_finished = false;       // draws nothing more until it is filled again
};

// KV memory: [L][num_pages][2: keys, values][page_tokens][G][K] in the compute dtype. Page
// `num_pages` of each layer is the scratch page that pads write.
class KvPages {
 public:
  KvPages(const ModelShape& shape, int32_t page_tokens, int32_t num_pages);

  // Bytes of one page over all layers.
  static int64_t page_bytes(const ModelShape& shape, int32_t page_tokens);

  DType dtype() const { return shape_.dtype; }
  int32_t page_tokens() const { return page_tokens_; }
  int32_t scratch_page() const { return num_pages_; }
  // K numbers of one key (or value) head of the token at `offset` of `page`.
  void* keys(int32_t layer, int32_t page, int32_t offset, int64_t kv_head);
  void* values(int32_t layer, int32_t page, int32_t offset, int64_t kv_head);
  void copy(const PageCopy& copy);
  // Gives the memory back, or takes it again, zeroed.
  void sleep() { std::exchange(memory_, {}); }
  void wake_up();
  bool is_asleep() const { return memory_.empty(); }
  int64_t held_bytes() const { return static_cast<int64_t>(memory_.size()); }

 private:
  std::byte* token(int32_t layer, int32_t page, int32_t which, int32_t offset);

  ModelShape shape_;
  int32_t page_tokens_;
  int32_t num_pages_;
  int64_t token_bytes_;
  std::vector<std::byte> memory_;
};

// One token row of the step, looked up once.
struct StepRow {
  int32_t token = 0;     // pending tokens resolved
  int32_t position = 0;  // kPadPosition for a pad
  int32_t sequence = 0;  // index into StepPlan::sequences
};

struct StepState {
  const StepPlan* plan = nullptr;
  std::vector<StepRow> rows;        // [T]
  std::vector<int32_t> head_rows;   // distinct sampled or scored rows, ascending
  std::vector<uint8_t> row_failed;  // [T] some K or V of the row was not finite
  StepResult result;
  bool has_head_results = false;

  int32_t page_of(const StepRow& row, int32_t position, int32_t page_tokens) const {
    const StepSequence& sequence = plan->sequences[static_cast<size_t>(row.sequence)];
    return plan
        ->page_tables[static_cast<size_t>(sequence.page_table_begin + position / page_tokens)];
  }
};

// Fills slots and copies pages as the plan says, then looks up its rows.
StepState begin_step(const StepPlan& plan, std::vector<Slot>& slots, KvPages& pages);

}  // namespace rollpack::kernels::reference
