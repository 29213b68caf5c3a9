// What the ops of one step share: the plan, the facts derived from it once (which sequence a row
// belongs to, attention tiles, head rows), the sequence slots, and the result under construction.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"

namespace rollpack::kernels::cpu {

// State of a sequence that outlives a step.
struct Slot {
  SlotInit init;
  bool is_set = false;
  int32_t pending_token = kPendingToken;  // sampled last; kPendingToken: nothing yet
  int32_t next_position = 0;              // of the next token to be sampled
  bool is_finished = false;               // draws nothing more until it is filled again
};

// Consecutive query rows of one sequence: entries [begin, begin + num_rows) of
// StepContext::live_rows, positions ascending by 1.
struct TilePart {
  int32_t sequence = 0;
  int32_t begin = 0;
  int32_t num_rows = 0;
  int32_t first_position = 0;
};

// Query rows that attention treats together: parts [first_part, first_part + num_parts) of
// StepContext::tile_parts. Their sequences have the first num_shared_pages pages in common, every
// key of which every row may see.
struct AttentionTile {
  int32_t first_part = 0;
  int32_t num_parts = 0;
  int32_t num_rows = 0;
  int32_t num_shared_pages = 0;
  int32_t last_position = 0;
};

class StepContext {
 public:
  StepContext(const ModelShape& shape, const BackendOptions& options, int32_t num_pages);

  // Starts a step: checks the plan, fills the slots and derives the rest. The plan outlives the
  // step. Errors: invalid_argument naming the entry of the plan and what is allowed; nothing is
  // changed then.
  void begin(const StepPlan& plan);
  void end() { plan_ = nullptr; }

  const StepPlan& plan() const;
  // Token of a row, the slot's where it is pending.
  int32_t token(int64_t row) const;
  int32_t page_of(int64_t row) const;
  // Marks a row whose K or V is not finite; several threads may.
  void fail_row(int64_t row);

  std::vector<Slot> slots;
  std::vector<int32_t> row_sequence;  // [T]
  std::vector<int32_t> live_rows;     // rows that are not pads, ascending
  std::vector<int32_t> pad_rows;
  std::vector<AttentionTile> tiles;  // those that see most keys first
  std::vector<TilePart> tile_parts;
  std::vector<int32_t> head_rows;        // distinct rows sampled or scored, ascending
  std::vector<int32_t> sample_head_row;  // [samples] index into head_rows
  std::vector<int32_t> score_head_row;   // [scores]
  std::vector<uint8_t> row_failed;       // [T]; written through fail_row()
  StepResult result;

 private:
  void derive_rows();
  void derive_tiles();
  int32_t common_pages(const TilePart& a, const TilePart& b) const;
  void derive_head_rows();

  ModelShape shape_;
  BackendOptions options_;
  int32_t num_pages_;
  int32_t rows_per_tile_;  // query rows of an attention tile
  const StepPlan* plan_ = nullptr;
};

// Most query rows of a tile: with the H / G heads that share a KV head they are 64 rows of the
// products (more only where one query row has more heads). 64 x 256 f32 scores of a chunk, their
// bf16 weights, K and V of the chunk, queries and sums are 200 KiB, which L2 holds beside the pages
// that come next.
int32_t attention_rows_per_tile(const ModelShape& shape);

}  // namespace rollpack::kernels::cpu
