// Logits of the head rows against the vocabulary and, without keeping the logits, what the step
// samples and scores. Head rows are worked on in groups, so that the statistics of their panels and
// the logits that truncated samples need have memory for one group.
//
// Where several ranks hold the vocabulary, each computes its own blocks of it. All exchange the
// statistics of blocks, so that each finds the block that a draw falls into, and the rank that
// holds it says which token that is and its logit. Logits of rows that truncated samples draw from
// are gathered, and every rank draws. All end with the same results.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/launch_shape.h"
#include "kernels/cuda/step_memory.h"

namespace rollpack::kernels::cuda {

inline constexpr int32_t kPanelColumns = 64;
inline constexpr int32_t kBlockPanels = 16;  // panels of a vocabulary block of 1,024
inline constexpr int32_t kGroupRows = 256;
inline constexpr int32_t kGroupQueries = 512;

// Columns of the vocabulary that this rank holds: whole blocks; all of them where it is alone.
struct VocabularyPart {
  int64_t V = 0;
  ShardRange held;
};

inline VocabularyPart vocabulary_part(const ModelShape& shape, ReplicaRank at) {
  return {shape.V, vocabulary_shard(shape.V, at)};
}

// Rows of a step and what is asked of them: a query is a sample or a score, by its place in
// HeadRows::results. A row with more queries than a group has is in several.
struct HeadGroup {
  int32_t first_row = 0;  // head rows [first_row, first_row + num_rows)
  int32_t num_rows = 0;
  int32_t first_query = 0;  // entries of HeadPlan::queries
  int32_t num_queries = 0;
  // Whether some query may be cut or keep tokens out, by what the host knows: the plans alone, so
  // that all ranks of a replica know the same.
  bool may_keep_logits = false;
};

struct HeadPlan {
  std::vector<int32_t> queries;  // [samples + scores] by head row, ascending
  std::vector<HeadGroup> groups;
};

// Head rows of samples and scores, in the plan's order; every one of [0, num_head_rows) occurs.
HeadPlan plan_head(std::span<const int32_t> sample_head_row,
                   std::span<const int32_t> score_head_row, int32_t num_head_rows);

// Bytes of the workspace that any step within `options` needs. Most of it are the logits of the
// rows that truncated samples draw from, at most 256 x V, on every rank.
int64_t lm_head_workspace_bytes(const ModelShape& shape, const BackendOptions& options);

struct LmHeadInputs {
  StepRows rows;
  HeadRows head;
  Slots slots;          // sampled slots take their token and go on by a position
  DeviceMatrix weight;  // [tokens held, D], not gated
  VocabularyPart part;
  Communicator* ranks = nullptr;  // over device memory, on this stream; null: this rank is alone
  DType dtype = DType::kBF16;
  const void* in = nullptr;           // [head.num_rows, D] dtype
  void* workspace = nullptr;          // lm_head_workspace_bytes()
  int32_t max_rows = 0;               // rows of a group that the workspace was sized for
  const int32_t* queries = nullptr;   // HeadPlan::queries in device memory
  std::span<const HeadGroup> groups;  // HeadPlan::groups, on the host
};

// Rows of a group for which the workspace has memory.
inline int32_t lm_head_group_rows(const BackendOptions& options) {
  return options.max_num_batched_tokens < kGroupRows ? options.max_num_batched_tokens : kGroupRows;
}

}  // namespace rollpack::kernels::cuda
