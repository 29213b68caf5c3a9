// The head: logits of the gathered rows against the vocabulary, reduced to block and panel
// statistics as they are computed, then the sampled tokens, logprobs and entropies. A token's panel
// is computed a second time for its logit (one panel of 64 columns), so logits are never kept;
// only those of rows with a sample that top-p, min-p or a large top-k truncates are, 32 rows at a
// time.
//
// Where several ranks hold the vocabulary, each computes its own blocks, all exchange statistics,
// and the one that holds a drawn token's panel says its logit; all end with the same results.
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
#include "kernels/cpu/vocab_exchange.h"
#include "kernels/cpu/vocab_stats.h"

namespace rollpack::kernels::cpu {

template <class Element>
class VocabHead {
 public:
  VocabHead(const KernelTable& kernels, PanelProducts<Element>& products, int num_threads,
            VocabExchange exchange);

  // Fills step.result and advances the slots. `in` has the step's head rows.
  void run(ThreadPool& pool, StepContext& step, const PackedMatrix& weight,
           const InputRows<Element>& in);

 private:
  // One sampled or scored token.
  struct Query {
    int32_t head_row = 0;
    int32_t slot = -1;
    int32_t token = -1;  // scored: given; sampled: drawn
    float scale = 1.0f;  // 1 / temperature; 1 where that is 0
    bool is_greedy = false;
    int32_t scaled = 0;          // its distribution at that scale
    int32_t num_candidates = 0;  // of a top-k and the ids that min_tokens takes out of it
    bool needs_logits = false;   // truncated by more than that
    bool wants_entropy = false;
    bool is_void = false;  // some logit is not finite
    std::span<const int32_t> banned;
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
    std::vector<float> unit_factors, scaled_factors;  // [blocks]
    TruncatedSampler sampler;
    std::vector<float> panel_max;  // [panels]
  };
  // What a query reads of a row that is kept.
  struct KeptRow {
    const float* logits = nullptr;
    std::span<const float> panel_max;
  };

  void collect_queries(StepContext& step);
  std::vector<Distribution> collect_distributions(int64_t num_head_rows, int64_t num_blocks);
  void make_groups(int64_t num_head_rows);
  void run_group(ThreadPool& pool, const StepContext& step, const Group& group);
  template <class Task>
  void for_queries(ThreadPool& pool, const Group& group, const Task& task);
  void exchange_group(ThreadPool& pool, const Group& group);
  void prepare(size_t index);
  Choice choose(const StepContext& step, size_t index, const KeptRow& kept, Workspace& work) const;
  Choice sample(const StepContext& step, size_t index, const KeptRow& kept, Workspace& work) const;
  TruncatedDraw draw_truncated(size_t index, const SamplingParams& sampling, const RowStats& row,
                               double u, const KeptRow& kept, Workspace& work) const;
  void conclude(size_t index, const Choice& choice, Workspace& work) const;
  KeptRow kept_row(const Group& group, const Query& query, int64_t index, Workspace& work) const;
  void advance_slots(StepContext& step);

  const KernelTable& kernels_;
  VocabExchange exchange_;
  VocabStats<Element> stats_;
  std::vector<Workspace> workspaces_;

  // Of the step at hand.
  int64_t V_ = 0;
  std::vector<Query> queries_;
  std::vector<Exclusion> left_;        // of queries with banned ids
  std::vector<CandidateList> listed_;  // of queries with candidates, where ranks exchange them
  std::vector<Choice> choices_;        // likewise, of all queries of a group
  std::vector<Group> groups_;
  std::vector<float> logits_;  // [rows of a group that keeps them][panels x 64]
  // The same of all ranks: [rows][panels of V x 64], [queries of the group][panels of V].
  std::vector<float> all_logits_, all_panel_max_;
};

extern template class VocabHead<uint16_t>;
extern template class VocabHead<float>;

}  // namespace rollpack::kernels::cpu
