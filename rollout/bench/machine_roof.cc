#include "rollout/bench/machine_roof.h"

#include <algorithm>

namespace rollpack::rollout {
namespace {

double distance(double a, double b) {
  const double larger = std::max(a, b);
  return larger > 0 ? (larger - std::min(a, b)) / larger : 0;
}

}  // namespace

double MachineRoof::least_seconds(double flops, double bytes) const {
  return std::max(flops / limits.peak_flops, bytes / limits.read_bandwidth_bytes_per_s);
}

double MachineRoof::least_seconds(const Measurement& measured) const {
  double seconds = 0;
  for (size_t i = 0; i < measured.step_flops.size(); ++i) {
    seconds += least_seconds(measured.step_flops[i], measured.step_bytes[i]);
  }
  return seconds;
}

MachineRoof combine(const kernels::MachineLimits& before, const kernels::MachineLimits& after) {
  const auto& [peak_before, read_before] = before;
  const auto& [peak_after, read_after] = after;
  return {.limits = {.peak_flops = std::max(peak_before, peak_after),
                     .read_bandwidth_bytes_per_s = std::max(read_before, read_after)},
          .drift = std::max(distance(peak_before, peak_after), distance(read_before, read_after))};
}

}  // namespace rollpack::rollout
