// Numbers that stand for many.
#pragma once

#include <vector>

namespace rollpack::rollout {

// The value that a share `quantile` of `values` does not exceed (nearest rank); there is one at
// least.
double percentile(std::vector<double> values, double quantile);

}  // namespace rollpack::rollout
