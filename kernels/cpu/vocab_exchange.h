// What the ranks of a replica tell each other in the head, where each holds some blocks of the
// vocabulary. Everybody makes the same calls, and afterwards has the same numbers, bit for bit.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/communicator/communicator.h"
#include "kernels/cpu/vocab_stats.h"

namespace rollpack::kernels::cpu {

// A token and what goes with it, from the one rank that has its logit.
struct Choice {
  int32_t token = -1;  // -1: another rank has it
  float logit = 0;
  float support_logmass = 0;
};

// The largest values of a row, in no particular order.
struct CandidateList {
  int32_t count = 0;  // how many are wanted
  std::vector<float> x;
  std::vector<int32_t> ids;
};

class VocabExchange {
 public:
  // Without a communicator this rank holds the whole vocabulary, and nothing is exchanged.
  VocabExchange(std::shared_ptr<Communicator> communicator, int64_t V);

  bool is_alone() const { return communicator_ == nullptr; }
  ReplicaRank at() const { return at_; }
  VocabularyPart part() const;
  // Columns of a row of logits of the whole vocabulary, in whole panels.
  int64_t logits_stride() const { return panel_starts_.back() * kPanelColumns; }
  int64_t num_panels() const { return panel_starts_.back(); }

  template <class Element>
  void share(VocabStats<Element>& stats) {
    stats.share(*communicator_, block_starts_);
  }
  // Statistics of the blocks that lost tokens, which their holders have.
  void share_exclusions(std::span<Exclusion* const> exclusions);
  // Each list becomes that of the whole vocabulary: `count` of each rank's.
  void share_candidates(std::span<CandidateList* const> lists);
  // held: [rows][columns held]; all: [rows][logits_stride()].
  void share_logits(const float* held, int64_t rows, float* all);
  // held: [rows][panels held]; all: [rows][num_panels()].
  void share_panels(const float* held, int64_t rows, float* all);
  // One rank has each of them, or none.
  void share_choices(std::span<Choice> choices);

 private:
  void gather(const float* held, int64_t rows, int64_t columns_per_panel, float* all);
  // Words that one rank has set and all others have left 0.
  void merge(std::span<uint32_t> words);

  const std::shared_ptr<Communicator> communicator_;
  const ReplicaRank at_;
  const int64_t V_;
  std::vector<int64_t> block_starts_, panel_starts_;  // [ranks + 1]
};

}  // namespace rollpack::kernels::cpu
