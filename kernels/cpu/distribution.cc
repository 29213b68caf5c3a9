#include "kernels/cpu/distribution.h"

#include "kernels/cpu/polynomial.h"

namespace rollpack::kernels::cpu {

void RowStats::add_blocks(std::span<const float> maxes, std::span<const double> sums,
                          std::span<const double> weighted_sums, std::span<const float> factors) {
  for (size_t b = 0; b < maxes.size(); ++b) {
    const auto factor = static_cast<double>(factors[b]);
    const auto shift = static_cast<double>(maxes[b] - max);
    total += sums[b] * factor;
    weighted += (weighted_sums[b] + shift * sums[b]) * factor;
  }
  log_total = log_f64(total);
}

void RowStats::add_blocks(std::span<const double> sums, std::span<const float> factors) {
  for (size_t b = 0; b < sums.size(); ++b) total += sums[b] * static_cast<double>(factors[b]);
  log_total = log_f64(total);
}

float RowStats::logprob(float x) const {
  return static_cast<float>(static_cast<double>(x) - static_cast<double>(max) - log_total);
}

float RowStats::entropy() const {
  return static_cast<float>(log_total - weighted / total);
}

}  // namespace rollpack::kernels::cpu
