#include "kernels/cpu/distribution.h"

#include <algorithm>
#include <limits>

#include "kernels/cpu/polynomial.h"

namespace rollpack::kernels::cpu {

BlockStats merge_panels(std::span<const PanelStats> panels) {
  BlockStats block{.max = -std::numeric_limits<float>::infinity()};
  for (const PanelStats& panel : panels) block.max = std::max(block.max, panel.max);
  for (const PanelStats& panel : panels) {
    const float shift = panel.max - block.max;
    const double factor = static_cast<double>(exp_f32(shift));
    const double sum = static_cast<double>(panel.sum);
    block.sum += sum * factor;
    block.weighted +=
        (static_cast<double>(panel.weighted) + static_cast<double>(shift) * sum) * factor;
  }
  return block;
}

RowStats merge_blocks(std::span<const BlockStats> blocks) {
  RowStats row{.max = -std::numeric_limits<float>::infinity()};
  for (const BlockStats& block : blocks) row.max = std::max(row.max, block.max);
  for (const BlockStats& block : blocks) {
    const float shift = block.max - row.max;
    const double factor = static_cast<double>(exp_f32(shift));
    row.total += block.sum * factor;
    row.weighted += (block.weighted + static_cast<double>(shift) * block.sum) * factor;
  }
  row.log_total = log_f64(row.total);
  return row;
}

float RowStats::logprob(float x) const {
  return static_cast<float>(static_cast<double>(x) - static_cast<double>(max) - log_total);
}

float RowStats::entropy() const { return static_cast<float>(log_total - weighted / total); }

}  // namespace rollpack::kernels::cpu
