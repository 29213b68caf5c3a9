// The support that top-k, top-p and min-p leave of one row, without banned ids, and the draw from
// it. Exact, ties broken by the lower id, and without sorting the vocabulary: from the candidates
// that were collected for a top-k, or from a row of logits with the largest value of each panel.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cpu/selection.h"
#include "kernels/step_plan.h"

namespace rollpack::kernels::cpu {

struct KernelTable;

// Largest top_k whose candidates are collected as logits are computed; for more of them, rows of
// logits are kept.
inline constexpr int32_t kMaxListedTopK = 1024;

// Whether the parameters cut anything of a vocabulary of V tokens.
bool truncates(const SamplingParams& sampling, int64_t V);
// Whether the top_k largest tokens are all that the parameters need of a row.
bool is_listed(const SamplingParams& sampling, int64_t V);

struct TruncatedDraw {
  int32_t token = -1;     // -1: the support is empty
  float max = 0;          // largest scaled logit of the support
  double kept = 0;        // sum over the support of exp(x - max)
  bool is_whole = false;  // nothing was cut
};

// A row that is kept.
struct LogitsOfRow {
  const float* logits = nullptr;  // [panels x 64] f32, unscaled; the first V are finite
  int64_t V = 0;
  float scale = 1.0f;
  // Of the tokens that are not banned, x = logit x scale:
  std::span<const float> panel_max;  // [panels] largest x
  float max = 0;                     // largest x
  double total = 0;                  // sum of exp(x - max)
};

// One thread's memory for it; sized by the first use.
class TruncatedSampler {
 public:
  // Order: banned ids leave the support, then top-k, then top-p on the distribution renormalised
  // after that (the crossing token is kept), then min-p relative to the largest probability left.
  // The draw is the inverse CDF at u over the kept tokens in the order of their ids.
  //   banned  sorted token ids; those past V mean nothing
  TruncatedDraw draw(const KernelTable& kernels, const LogitsOfRow& row,
                     const SamplingParams& sampling, std::span<const int32_t> banned, double u);

  // The same from the lists below, in any order: x and ids of the largest tokens, at least as many
  // as top_k and the banned ids are. is_whole is false.
  TruncatedDraw draw_listed(const KernelTable& kernels, const SamplingParams& sampling,
                            std::span<const int32_t> banned, double u);
  std::vector<float> x;
  std::vector<int32_t> ids;

 private:
  // What a token counts in a search.
  enum class Weight { kOne, kMass };
  struct Limits {
    float low, high;
  };

  void erase_banned(std::span<const int32_t> banned);
  void keep_top_k(const KernelTable& kernels, int32_t top_k);
  void sort_by_id();
  Cut find_cut(const KernelTable& kernels, const LogitsOfRow& row, std::span<const int32_t> banned,
               Weight weight, double target, double total);
  Limits sample_limits(const KernelTable& kernels, const LogitsOfRow& row, Weight weight,
                       double share);
  double gather(const KernelTable& kernels, const LogitsOfRow& row, std::span<const int32_t> banned,
                Weight weight, Limits limits);
  double fill_panel_masses(const KernelTable& kernels, const LogitsOfRow& row,
                           std::span<const int32_t> banned, const Cut& cut, float min_p,
                           int64_t* count);
  TruncatedDraw draw_kept(const KernelTable& kernels, const LogitsOfRow& row,
                          const SamplingParams& sampling, std::span<const int32_t> banned,
                          const Cut& cut, double u);

  CutFinder finder_;
  std::vector<float> mass_;        // of x and ids
  std::vector<uint64_t> by_id_;    // keys
  std::vector<float> panel_top_;   // [panels] exp(panel_max - max)
  std::vector<float> panel_mass_;  // [panels] kept
  std::vector<float> sample_, sample_mass_;
};

}  // namespace rollpack::kernels::cpu
