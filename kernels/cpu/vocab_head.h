// The head: logits of the gathered rows against the vocabulary, reduced to block and panel
// statistics as they are computed, then the sampled tokens, logprobs and entropies. A token's panel
// is computed a second time for its logit (one panel of 64 columns), so logits are never kept;
// only rows with a truncated sample are, some tens of MiB at a time.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/distribution.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/packing.h"
#include "kernels/cpu/step_context.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/truncation.h"

namespace rollpack::kernels::cpu {

template <class Element>
class VocabHead {
 public:
  VocabHead(const KernelTable& kernels, int num_threads);

  // Fills step.result and advances the slots. `in` has the step's head rows.
  void run(ThreadPool& pool, StepContext& step, const PackedMatrix& weight,
           const InputRows<Element>& in);

 private:
  // The softmax of one head row at one temperature; scale 1 comes first for every row.
  struct Distribution {
    int32_t head_row = 0;
    float scale = 1.0f;
    int64_t first_panel = -1;  // of its panels in panels_, -1: nothing is drawn from it
  };
  // One sampled or scored token.
  struct Query {
    int32_t head_row = 0;
    int32_t slot = -1;
    int32_t token = -1;      // scored: given; sampled: drawn
    float scale = 1.0f;      // 1 / temperature; 1 where that is 0
    bool is_greedy = false;
    int32_t scaled = 0;      // its distribution at that scale
    bool needs_logits = false;  // some tokens are cut from its support
    bool wants_entropy = false;
    HeadResult* result = nullptr;
  };
  // Rows whose logits are computed together, and the queries they serve.
  struct Group {
    std::vector<int32_t> head_rows;
    std::vector<int32_t> queries;
    bool keeps_logits = false;
  };
  // One thread's memory.
  struct Workspace {
    std::vector<PanelStats> panels;  // [distributions of a row chunk][kBlockPanels]
    TruncatedSampler sampler;
  };

  void collect_queries(StepContext& step);
  void collect_distributions(int64_t num_head_rows);
  void make_groups(int64_t num_head_rows);
  void find_group_rows(const Group& group);
  void run_group(ThreadPool& pool, const StepContext& step, const Group& group);
  void compute_block(const Group& group, int64_t block, int64_t first, int64_t last,
                     Workspace& work);
  // Statistics of rows [first, first + rows) of the group in one panel; stats belongs to
  // distribution `first_distribution`.
  void reduce_tile(const Group& group, const float* tile, int64_t first, int rows, int64_t panel,
                   int64_t first_distribution, PanelStats* stats);
  void finish_query(const StepContext& step, const Query& query, const float* logits,
                    Workspace& work) const;
  int32_t sample(const StepContext& step, const Query& query, const RowStats& row,
                 const float* logits, Workspace& work) const;
  int32_t draw(const Query& query, const RowStats& row, double u) const;
  int32_t greedy(const Query& query, const RowStats& row) const;
  void panel_logits(int32_t head_row, int64_t panel, float* logits) const;
  int panel_columns(int64_t panel) const;
  std::span<const BlockStats> blocks_of(int32_t distribution) const;
  void advance_slots(StepContext& step);

  const KernelTable& kernels_;
  const ElementKernels<Element>& of_;
  std::vector<Workspace> workspaces_;

  // Of the step at hand.
  PackedMatrix weight_;
  InputRows<Element> in_;
  int64_t num_blocks_ = 0;
  std::vector<Query> queries_;
  std::vector<Distribution> distributions_;   // by head row, scale 1 first
  std::vector<int32_t> first_distribution_;   // [head rows + 1]
  std::vector<Group> groups_;
  std::vector<PanelStats> panels_;            // [drawn distributions][panels of the vocabulary]
  std::vector<BlockStats> blocks_;            // [distributions][blocks]
  std::vector<uint8_t> row_not_finite_;       // [head rows]
  std::vector<Element> group_rows_;           // rows of a group that are not contiguous in in_
  InputRows<Element> group_in_;
  std::vector<float> logits_;                 // [rows of a group that keeps them][V]
};

extern template class VocabHead<uint16_t>;
extern template class VocabHead<float>;

}  // namespace rollpack::kernels::cpu
