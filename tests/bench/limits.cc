#include "tests/bench/limits.h"

#include <algorithm>
#include <map>
#include <utility>

#include "kernels/machine_limits.h"
#include "tests/bench/report.h"

namespace rollpack::bench {
namespace {

using kernels::RegisterWidth;

std::map<std::pair<Limit, int>, double>& measured() {
  static std::map<std::pair<Limit, int>, double> values;
  return values;
}

double measure(Limit limit, int num_threads) {
  switch (limit) {
    case Limit::kBF16Peak:
      return kernels::measure_peak_flops(DType::kBF16, num_threads);
    case Limit::kF32Peak:
      return kernels::measure_peak_flops(DType::kF32, num_threads);
    case Limit::kYmmPeak:
      return kernels::measure_peak_flops(DType::kF32, num_threads, RegisterWidth::kYmm);
    case Limit::kReadBandwidth:
      return kernels::measure_read_bandwidth(num_threads);
  }
  return 0;
}

}  // namespace

const char* limit_name(Limit limit) {
  switch (limit) {
    case Limit::kBF16Peak:
      return "bf16 peak";
    case Limit::kF32Peak:
      return "f32 peak";
    case Limit::kYmmPeak:
      return "ymm peak";
    case Limit::kReadBandwidth:
      return "read";
  }
  return "";
}

double limit_of(Limit limit, int num_threads) {
  if (is_smoke()) return 1;
  const auto [entry, is_new] = measured().try_emplace({limit, num_threads}, 0.0);
  if (is_new) entry->second = measure(limit, num_threads);
  return entry->second;
}

double measure_limits_again() {
  double apart = 1;
  for (auto& [key, value] : measured()) {
    const double again = measure(key.first, key.second);
    apart = std::max({apart, again / value, value / again});
    value = std::max(value, again);
  }
  return apart;
}

Limit peak_of(kernels::cpu::Isa isa, DType dtype) {
  using kernels::cpu::Isa;
  if (isa == Isa::kAvx512Bf16) return dtype == DType::kBF16 ? Limit::kBF16Peak : Limit::kF32Peak;
  return isa == Isa::kAvx2 ? Limit::kYmmPeak : Limit::kF32Peak;
}

}  // namespace rollpack::bench
