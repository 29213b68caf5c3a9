// One step of the engine as data: which token rows to compute, where their keys and values go, and
// which rows to sample or to score. A plan carries no numbers that a device already holds: the last
// token of a sequence, its random stream and its stop set live in the backend's sequence slots.
#pragma once

#include <cstdint>
#include <vector>

namespace rollpack::kernels {

// input_ids entry that means "the token this sequence's slot sampled last".
inline constexpr int32_t kPendingToken = -1;
// positions entry of a pad row: computed by every linear layer, its K and V go to a scratch page,
// it attends to nothing (its attention output is 0) and nothing attends to it.
inline constexpr int32_t kPadPosition = -1;

// How a slot samples. Temperature 0 is greedy. Off: top_k <= 0, top_p 1, min_p 0.
struct SamplingParams {
  float temperature = 1.0f;
  int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;
};

// Fills a sequence slot before the step's rows are computed.
struct SlotInit {
  int32_t slot = 0;
  SamplingParams sampling;
  uint64_t seed = 0;
  uint64_t prompt_hash = 0;   // FNV-1a 64 of the prompt_id's text
  uint32_t sample_index = 0;
  int32_t next_position = 0;  // absolute position of the next token to be sampled
  int32_t min_position = 0;   // below this position stop tokens are out of the support (min_tokens)
  int32_t end_position = 0;   // the token sampled at end_position - 1 ends the sample with `length`
  std::vector<int32_t> stop_token_ids;  // sorted; empty where stops are ignored
};

// Copies tokens [0, num_tokens) of page `source` to page `target`, all layers, before the rows run.
struct PageCopy {
  int32_t source = 0;
  int32_t target = 0;
  int32_t num_tokens = 0;
};

// Consecutive rows of one sequence. Row i of it (0-based) stands at positions[row_begin + i], which
// ascend by 1 over rows that are not pads; it sees keys [0, position] of the same page table.
struct StepSequence {
  int32_t slot = -1;            // slot that pending tokens come from; -1: no row is pending
  int32_t row_begin = 0;
  int32_t num_rows = 0;
  int32_t page_table_begin = 0; // into StepPlan::page_tables; entry j holds positions
  int32_t num_pages = 0;        // [j * page_tokens, (j + 1) * page_tokens)
};

// Draws the next token of `slot` from the logits of `row`. Siblings of a group name the same row
// for their first token; its logits are computed once.
//
// A slot has finished when it drew a stop token, its last token, or from logits that are not
// finite. It draws nothing more until a SlotInit fills it again: its samples are rejected. So a
// step may be planned before the results of the one before are known: where a sample has ended
// meanwhile, its pending row is computed, into its own pages, and draws nothing.
//
// Drafts: entries next to each other may name one slot, at consecutive rows of that slot's own
// sequence. Entry k of them draws at the slot's next position + k, and the rows of entries 1, 2, ..
// carry guesses of what the entries before them draw, as token ids. Entry k counts if entry k - 1
// counts, was finite, did not finish the sample and drew exactly the token in the row of entry k;
// otherwise it is rejected. So a draw that counts saw the tokens it would have seen without drafts,
// at the position whose random number it takes: drafts change no bit. The slot goes on behind the
// last entry that counts; keys and values of later rows stay in their pages, at positions that the
// sequence's next rows write again. The host learns the slot's position from the result: no plan
// may name the slot while such a step is in flight.
// Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", ICML 2023,
//   with a draft of one certain token: drawing from the model and comparing accepts as often.
struct SampleRow {
  int32_t row = 0;
  int32_t slot = 0;
};

// Scores `token` as the successor of `row`.
struct ScoreRow {
  int32_t row = 0;
  int32_t token = 0;
  float temperature = 1.0f;
};

struct StepPlan {
  std::vector<PageCopy> page_copies;
  std::vector<SlotInit> slot_inits;
  std::vector<int32_t> input_ids;  // [T] token id or kPendingToken
  std::vector<int32_t> positions;  // [T] absolute position in its sequence or kPadPosition
  std::vector<StepSequence> sequences;  // [S] rows in order, together exactly [0, T)
  std::vector<int32_t> page_tables;
  std::vector<SampleRow> samples;
  std::vector<ScoreRow> scores;
  bool wants_entropy = false;  // entropy of sampled rows as well; scored rows always have it

  int64_t num_rows() const { return static_cast<int64_t>(input_ids.size()); }
};

enum class SlotFinish : uint8_t { kRunning, kStop, kLength };

// What the head says of one sampled or scored row. Logprobs are natural logs, f32.
struct HeadResult {
  int32_t slot = -1;      // -1 for a scored row
  int32_t position = 0;   // absolute position of the token
  int32_t token = 0;
  float logprob = 0;         // log softmax(logits)[token]
  float scaled_logprob = 0;  // log softmax(logits / temperature)[token]
  float support_logmass = 0; // log of the scaled mass kept by truncation; 0 when nothing is cut
  float entropy = 0;         // of the scaled distribution, full vocabulary; NaN if not asked for
  SlotFinish finish = SlotFinish::kRunning;
  bool is_finite = true;     // false: some logit was NaN or +-infinity; token and numbers are void
  // A draw behind a wrong draft, or of a slot that had finished before: all but `slot` is void.
  bool is_rejected = false;
};

struct StepResult {
  std::vector<HeadResult> samples;  // in the order of StepPlan::samples
  std::vector<HeadResult> scores;   // in the order of StepPlan::scores
  // Indices of sequences whose K or V was not finite, in a row that was not a rejected draft.
  std::vector<int32_t> failed_sequences;
};

}  // namespace rollpack::kernels
