// The support that top-k, top-p, min-p and min_tokens leave of one row of logits, and the draw from
// it. Exact: ties are broken by the lower id, nothing is approximated by thresholds.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/step_plan.h"

namespace rollpack::kernels::cpu {

struct KernelTable;

// Whether the parameters cut anything of a vocabulary of V tokens.
bool truncates(const SamplingParams& sampling, int64_t V);

struct TruncatedDraw {
  int32_t token = -1;       // -1: the support is empty
  float max = 0;            // largest scaled logit of the support
  double kept = 0;          // sum over the support of exp(x - max)
  bool is_whole = false;    // nothing of non-zero mass was cut
};

// One thread's memory for it; sized by the first use.
class TruncatedSampler {
 public:
  // Order: banned ids leave the support, then top-k, then top-p on the distribution renormalised
  // after that (the crossing token is kept), then min-p relative to the largest probability left.
  // The draw is the inverse CDF at u over the kept tokens in the order of their ids.
  //   logits  [V] f32, unscaled, finite      banned  sorted token ids; those past V mean nothing
  TruncatedDraw draw(const KernelTable& kernels, std::span<const float> logits, float scale,
                     const SamplingParams& sampling, std::span<const int32_t> banned, double u);

  // Lowest id among the largest logits that are not banned; -1 if all are.
  int32_t greedy(std::span<const float> logits, std::span<const int32_t> banned);

 private:
  void sort_candidates(float max, int64_t top_k, double target_share);
  void keep_sorted(int64_t top_k, float top_p, float max);
  double mass_of(int32_t id) const { return static_cast<double>(mass_[static_cast<size_t>(id)]); }

  std::vector<float> scaled_;      // [V] logits x scale, -infinity where banned
  std::vector<float> mass_;        // [V] exp(scaled - max)
  std::vector<uint64_t> ordered_;  // keys of candidates: descending logit, then ascending id
  std::vector<int32_t> kept_;      // ids, ascending in the end
};

}  // namespace rollpack::kernels::cpu
