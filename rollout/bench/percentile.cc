#include "rollout/bench/percentile.h"

#include <algorithm>
#include <cmath>

namespace rollpack::rollout {

double percentile(std::vector<double> values, double quantile) {
  const auto rank = static_cast<size_t>(std::ceil(quantile * static_cast<double>(values.size())));
  const auto place = values.begin() + static_cast<ptrdiff_t>(std::max<size_t>(rank, 1) - 1);
  std::ranges::nth_element(values, place);
  return *place;
}

}  // namespace rollpack::rollout
