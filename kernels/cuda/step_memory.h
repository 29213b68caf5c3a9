// What kernels see of a step, of the sequence slots and of the KV cache: structs of pointers into
// device memory, passed to kernels by value. CudaBackend fills them; rows and head entries are
// those of the StepPlan, checked before.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/host_device.h"
#include "kernels/step_plan.h"

namespace rollpack::kernels::cuda {

inline constexpr int32_t kPageTokens = 16;
// Steps that the device may have been given: each has a place of its own for rows and results.
inline constexpr int32_t kMaxStepsUnderWay = 2;

// input_ids entry of a row that fills a step up to the rows of its graph: it is at kPadPosition,
// has no pages and no samples, and kernels of single rows leave what it has in memory as it is.
inline constexpr int32_t kSkippedRow = -2;

// What else a step's kernels read on the device, so that a graph holds for every step of its rows.
struct StepScalars {
  int32_t num_items = 0;      // of attention's work list
  int32_t wants_entropy = 0;  // of samples; scores always have it
};

// The token rows of a step. Row r of sequence s lies in page
// page_tables[page_table_starts[s] + positions[r] / kPageTokens].
struct StepRows {
  int32_t num_rows = 0;                        // T
  int32_t num_sequences = 0;                   // S
  const StepScalars* scalars = nullptr;        // [1]
  const int32_t* input_ids = nullptr;          // [T] token id, kPendingToken or kSkippedRow
  const int32_t* positions = nullptr;          // [T] or kPadPosition
  const int32_t* row_sequence = nullptr;       // [T] index of its sequence
  const int32_t* sequence_slot = nullptr;      // [S] slot of pending tokens, or -1
  const int32_t* row_starts = nullptr;         // [S] first row of a sequence
  const int32_t* row_counts = nullptr;         // [S]
  const int32_t* page_table_starts = nullptr;  // [S] into page_tables
  const int32_t* page_counts = nullptr;        // [S]
  const int32_t* page_tables = nullptr;
  uint8_t* row_failed = nullptr;  // [T] rope_append sets 1 where some K or V is not finite

  bool operator==(const StepRows&) const = default;
};

// A sequence slot, as the kernels of the step before left it.
struct SlotState {
  uint64_t seed = 0;
  uint64_t prompt_hash = 0;
  uint32_t sample_index = 0;
  int32_t pending_token = kPendingToken;  // sampled last; kPendingToken: nothing yet
  int32_t next_position = 0;              // of the next token to be sampled
  int32_t min_position = 0;               // below it stop tokens are out of the support
  int32_t end_position = 0;               // the token at end_position - 1 ends the sample
  float temperature = 1.0f;
  int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;
  int32_t num_stop_tokens = 0;
  int32_t is_finished = 0;  // 1: draws nothing more until it is filled again
};

// Whether top-k, top-p or min-p may cut what a slot draws from.
ROLLPACK_HOST_DEVICE inline bool is_cut(const SlotState& slot, int64_t V) {
  return slot.temperature != 0 &&
         ((slot.top_k > 0 && slot.top_k < V) || slot.top_p < 1.0f || slot.min_p > 0.0f);
}

// All slots. The stop set of slot s is a bit a token id, stop_words words from s * stop_words; it
// is all 0 where num_stop_tokens is 0.
struct Slots {
  SlotState* states = nullptr;    // [max_num_seqs]
  uint32_t* stop_bits = nullptr;  // [max_num_seqs, stop_words]
  int32_t stop_words = 0;         // ceil(V / 32)

  ROLLPACK_HOST_DEVICE bool is_stop(int32_t slot, int32_t token) const {
    return (stop_bits[static_cast<int64_t>(slot) * stop_words + token / 32] >> (token % 32) & 1u) !=
           0;
  }
};

// The rows that the head reads and what it says of them. Samples and scores in the plan's order;
// results has the samples first. Those that fill a step up to the rows of its graph have no row and
// no slot, -1, and no result.
struct HeadRows {
  int32_t num_rows = 0;  // distinct rows sampled or scored
  int32_t num_samples = 0;
  int32_t num_scores = 0;
  const int32_t* rows = nullptr;             // [num_rows] rows of the step, ascending
  const int32_t* sample_head_row = nullptr;  // [num_samples] index into rows
  const int32_t* sample_slot = nullptr;      // [num_samples]
  const int32_t* sample_draw = nullptr;      // [num_samples] draws of that slot before this one
  const int32_t* score_head_row = nullptr;   // [num_scores] index into rows
  const int32_t* score_token = nullptr;      // [num_scores]
  const float* score_temperature = nullptr;  // [num_scores]
  HeadResult* results = nullptr;             // [num_samples + num_scores]

  bool operator==(const HeadRows&) const = default;
};

// K and V of all pages: [layer][page][head][K, V][kPageTokens][row_stride]. A token's row is its K
// elements, then zeros up to row_stride, a multiple of 16: rows are aligned to 16 bytes, and an mma
// over whole steps of 16 reads zeros behind the head. Elements are bf16 bits or f32. All memory is
// zero before it is written, so tokens that no row wrote are finite.
struct KvCache {
  std::byte* data = nullptr;
  int64_t num_pages = 0;
  int32_t G = 0;
  int32_t K = 0;
  int32_t row_stride = 0;

  template <class Element>
  ROLLPACK_HOST_DEVICE Element* keys(int32_t layer, int32_t page, int32_t head) const {
    return reinterpret_cast<Element*>(data) +
           ((layer * num_pages + page) * G + head) * 2 * kPageTokens * row_stride;
  }
  template <class Element>
  ROLLPACK_HOST_DEVICE Element* values(int32_t layer, int32_t page, int32_t head) const {
    return keys<Element>(layer, page, head) + kPageTokens * row_stride;
  }
};

// A weight [N, K_in] in device memory, rows of row_stride elements: K_in, then zeros up to a
// multiple of 16 bytes. data is aligned to 256 bytes.
// Gated: rows come in groups of 16, 8 of gate and then the same 8 of up, so that one lane of an mma
// holds both; N counts the columns of the output and the last group is filled up with zeros.
struct DeviceMatrix {
  const void* data = nullptr;
  int64_t N = 0;
  int64_t K_in = 0;
  int64_t row_stride = 0;  // elements
  bool is_gated = false;
};

}  // namespace rollpack::kernels::cuda
