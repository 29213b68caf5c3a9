// Logits of head rows against the vocabulary, reduced as they are computed to the statistics of
// their softmax: a block of 1024 columns at a time, by panels of 64. The logits themselves are not
// kept, unless the caller asks for them. Where several ranks hold the vocabulary, each computes its
// own blocks; share() then gives all of them the statistics of all blocks, while panels and logits
// stay with their owner.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/communicator/communicator.h"
#include "kernels/cpu/candidates.h"
#include "kernels/cpu/distribution.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/packing.h"
#include "kernels/cpu/thread_pool.h"

namespace rollpack::kernels::cpu {

// The softmax of one head row at one temperature.
struct Distribution {
  int32_t head_row = 0;
  float scale = 1.0f;          // 1 / temperature
  int64_t first_block = -1;    // of its panels, where they are kept: something is drawn from it
  int32_t num_candidates = 0;  // how many of its largest values are collected, for top-k
};

// The statistics of a row without some of its tokens.
struct Exclusion {
  std::span<const int32_t> ids;  // ascending
  RowStats row;                  // weighted is not set; max is -infinity where no token is left
  std::vector<float> block_max, factors;  // [blocks]; exp(block max - row max)
  std::vector<double> block_sum;
  struct Changed {
    int64_t block = 0;
    BlockPanels panels;  // where this rank holds the block
  };
  std::vector<Changed> changed;  // blocks that lost a token
};

// Which part of the vocabulary's V tokens a packed matrix has: whole blocks, from first_block on.
struct VocabularyPart {
  int64_t V = 0;
  int64_t first_block = 0;
};

template <class Element>
class VocabStats {
 public:
  VocabStats(const KernelTable& kernels, PanelProducts<Element>& products, int num_threads);

  // Starts a step. `distributions` ascend by head row, each row's first has scale 1; every row of
  // `in` has one. with_entropy: the weighted sums as well.
  void begin(const PackedMatrix& weight, const VocabularyPart& part, const InputRows<Element>& in,
             std::vector<Distribution> distributions, bool with_entropy);
  // Computes the statistics of these rows, ascending. logits: [head_rows.size()][logits_stride()]
  // f32, unscaled, columns past V of no meaning; or null.
  void compute(ThreadPool& pool, std::span<const int32_t> head_rows, float* logits);
  // Exchanges what compute() found. Without it the calls below know the blocks held here alone.
  //   block_starts  [ranks + 1] the blocks that each rank holds
  void share(Communicator& communicator, std::span<const int64_t> block_starts);

  // The tokens held here, rounded up to whole panels.
  int64_t logits_stride() const { return weight_.num_panels() * kPanelColumns; }
  // Of the whole vocabulary.
  int64_t num_blocks() const { return num_blocks_; }
  bool holds_token(int32_t token) const { return holds(token / kBlockColumns); }
  // Index of the row's distribution of scale 1; those of the next row begin where its own end.
  int32_t first_distribution(int32_t head_row) const {
    return first_distribution_[static_cast<size_t>(head_row)];
  }
  bool is_finite(int32_t head_row) const {
    return row_not_finite_[static_cast<size_t>(head_row)] == 0;
  }
  // The row's largest x.
  float max_of(int32_t distribution) const;
  // Sums of the whole row. factors: [num_blocks()], exp(block max - row max) of each block.
  RowStats merge(int32_t distribution, std::span<float> factors) const;
  // Inverse CDF at u, with what merge() gave: the token, and its logit before scaling; token -1
  // where another rank holds it.
  struct Drawn {
    int32_t token = -1;
    float logit = 0;
  };
  Drawn draw(int32_t distribution, const RowStats& row, std::span<const float> factors,
             double u) const;
  // The lowest id of the row's largest logit.
  Drawn greedy(int32_t distribution, const RowStats& row) const;
  // Takes tokens out of a row: their panels are computed once more without them, so they have no
  // mass at all. ids ascend; those past V mean nothing. The statistics of changed blocks that
  // another rank holds are 0 until the caller has them; then finish_exclusion() sums up.
  void exclude(int32_t distribution, std::span<const int32_t> ids, Exclusion& out) const;
  void finish_exclusion(Exclusion& out) const;
  // The same draws from what an exclusion left, which is not nothing.
  Drawn draw(int32_t distribution, const Exclusion& left, double u) const;
  Drawn greedy(int32_t distribution, const Exclusion& left) const;
  // The largest value of each panel held here, of all tokens or of those that are left.
  void panel_maxima(int32_t distribution, const Exclusion* left, std::vector<float>& out) const;
  // The row's collected candidates, in no particular order: the num_candidates largest by
  // (x descending, id ascending), and some more.
  void collect_candidates(int32_t distribution, std::vector<float>& x,
                          std::vector<int32_t>& ids) const {
    candidates_.collect(distribution, x, ids);
  }
  // One logit, of a token held here, computed once more.
  float logit(int32_t head_row, int32_t token) const;

 private:
  using Item = PanelProducts<Element>::Item;

  // A row of a tile whose largest values are collected.
  struct Collecting {
    int32_t row = 0;    // of Workspace::rows
    int32_t index = 0;  // of the distribution
  };
  // What a tile has of Workspace::rows and Workspace::collecting: [first, end).
  struct TileRows {
    size_t first_row = 0, end_row = 0;
    size_t first_collecting = 0, end_collecting = 0;
  };
  // One thread's memory.
  struct Workspace {
    int thread = 0;
    std::vector<BlockPanels> panels;  // [distributions of a chunk of rows]
    // Of all tiles of the chunk, one after the other: every panel of a block is reduced by them.
    std::vector<LogitsRow> rows;
    std::vector<Collecting> collecting;
    std::vector<TileRows> tiles;
  };
  // Where a draw finds the masses of a row.
  struct Masses {
    RowStats row;
    const float* block_max = nullptr;
    const double* block_sum = nullptr;
    const float* factors = nullptr;
    const Exclusion* left = nullptr;
  };

  void gather(std::span<const int32_t> head_rows);
  void compute_block(std::span<const int32_t> head_rows, Item item, int64_t block, float* logits,
                     Workspace& work);
  void keep_logits(const float* sums, int64_t row, size_t num_rows, int64_t panel,
                   float* logits) const;
  void list_rows(std::span<const int32_t> head_rows, const Item& item, int64_t first_index,
                 Workspace& work) const;
  void reduce_tile(std::span<const int32_t> tile_rows, const float* tile, int64_t panel,
                   const TileRows& listed, Workspace& work);
  void finish_block(int32_t distribution, int64_t block, const BlockPanels& panels);
  // Panels below are numbered over the whole vocabulary, where not said otherwise.
  bool holds(int64_t block) const {
    return block >= first_block_ && block < first_block_ + num_held_blocks_;
  }
  void panel_logits(int32_t head_row, int64_t panel, float* logits) const;
  int panel_columns(int64_t held_panel) const;
  const BlockPanels& kept_panels(int32_t distribution, int64_t block, const Exclusion* left) const;
  void panel_logits_left(int32_t distribution, int64_t panel, const Exclusion* left,
                         float* logits) const;
  Drawn draw_from(int32_t distribution, const Masses& masses, double u) const;
  Drawn greedy_from(int32_t distribution, const Masses& masses) const;

  const KernelTable& kernels_;
  PanelProducts<Element>& products_;
  std::vector<Workspace> workspaces_;
  CandidateLists candidates_;

  // Of the step at hand.
  PackedMatrix weight_;
  InputRows<Element> in_;
  bool with_entropy_ = false;
  int64_t V_ = 0, num_blocks_ = 0;
  int64_t first_block_ = 0, num_held_blocks_ = 0;
  std::vector<Distribution> distributions_;
  std::vector<int32_t> first_distribution_;  // [head rows + 1]
  std::vector<int32_t> candidate_counts_;    // [distributions]
  std::vector<BlockPanels> panels_;          // [drawn distributions][blocks held]
  std::vector<float> block_max_;             // [distributions][blocks]
  std::vector<double> block_sum_, block_weighted_;
  std::vector<uint8_t> row_not_finite_;  // [head rows]
  std::vector<Element> gathered_;        // rows of a call that are not all of in_
  InputRows<Element> group_;             // the rows of a call, contiguous
};

extern template class VocabStats<uint16_t>;
extern template class VocabStats<float>;

}  // namespace rollpack::kernels::cpu
