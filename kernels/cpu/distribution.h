// The softmax of one row of logits at one temperature, as the statistics of its vocabulary blocks
// (1024 columns) and panels (64): enough for logprobs, entropy and the draw, without the logits.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/cpu/kernel_table.h"

namespace rollpack::kernels::cpu {

inline constexpr int64_t kBlockColumns = kBlockPanels * kPanelColumns;

// A whole row.
struct RowStats {
  float max = 0;
  double total = 0;  // sum over blocks, in order, of sum * exp(m - max)
  double log_total = 0;
  double weighted = 0;  // sum over all x of (x - max) exp(x - max)

  // Sums up the blocks, in order; factors[b] = exp(maxes[b] - max). `max` is set already.
  void add_blocks(std::span<const float> maxes, std::span<const double> sums,
                  std::span<const double> weighted_sums, std::span<const float> factors);
  // The same of total and log_total alone.
  void add_blocks(std::span<const double> sums, std::span<const float> factors);
  // log softmax of a logit, which is scaled and rounded already. Rounded once.
  float logprob(float x) const;
  // Nats.
  float entropy() const;
};

// One level of the inverse CDF.
struct Pick {
  int64_t item = -1;  // -1: every item has zero mass
  double before = 0;  // running mass of what lies before it
};

// The first of `count` items whose running mass, which starts at `running`, exceeds `target`; where
// rounding leaves none, the last item of non-zero mass. mass_of(i) is item i's mass.
template <class MassOf>
Pick pick_item(int64_t count, double running, double target, MassOf mass_of) {
  Pick pick;
  for (int64_t i = 0; i < count; ++i) {
    const double mass = mass_of(i);
    if (!(mass > 0)) continue;
    pick = {.item = i, .before = running};
    running += mass;
    if (running > target) return pick;
  }
  return pick;
}

}  // namespace rollpack::kernels::cpu
