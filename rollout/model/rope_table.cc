#include "rollout/model/rope_table.h"

#include <cmath>
#include <numbers>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

// With w = 2 pi / f the wavelength and n the original context length:
//   w < n / high          f stays
//   w > n / low           f / factor
//   between               s = (n / w - low) / (high - low);  (1 - s) f / factor + s f
double llama3_frequency(const RopeConfig& rope, double frequency) {
  const auto context = static_cast<double>(rope.original_max_position_embeddings);
  const double wavelength = 2 * std::numbers::pi / frequency;
  if (wavelength < context / rope.high_freq_factor) return frequency;
  if (wavelength > context / rope.low_freq_factor) return frequency / rope.factor;
  const double smooth = (context / wavelength - rope.low_freq_factor) /
                        (rope.high_freq_factor - rope.low_freq_factor);
  return (1 - smooth) * frequency / rope.factor + smooth * frequency;
}

// `value` rounded to f32, or `exact` where the last bits of value could decide. glibc's f64 sine
// and cosine are off by a unit in the last place at most, 2^-52 of the value: with four times that
// as margin the slow function is asked for one value in 2^25, and every f32 is as if it always
// were.
template <class Exact>
float rounded(double value, Exact exact) {
  const double margin = std::abs(value) * 0x1p-50;
  const auto low = static_cast<float>(value - margin);
  const auto high = static_cast<float>(value + margin);
  return low == high ? low : static_cast<float>(exact());
}

}  // namespace

std::vector<double> rope_frequencies(const RopeConfig& rope, int64_t head_dim) {
  if (head_dim < 2 || head_dim % 2 != 0) fail_invariant("head_dim of a rotary table is odd");
  std::vector<double> frequencies;
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    const long double exponent = static_cast<long double>(2 * i) / head_dim;
    auto frequency =
        static_cast<double>(1.0L / std::pow(static_cast<long double>(rope.theta), exponent));
    if (rope.scaling == RopeScaling::kLinear) frequency /= rope.factor;
    if (rope.scaling == RopeScaling::kLlama3) frequency = llama3_frequency(rope, frequency);
    frequencies.push_back(frequency);
  }
  return frequencies;
}

std::vector<float> make_rope_table(const RopeConfig& rope, int64_t head_dim,
                                   int64_t num_positions) {
  const std::vector<double> frequencies = rope_frequencies(rope, head_dim);
  const auto half = static_cast<size_t>(head_dim / 2);
  std::vector<float> table(static_cast<size_t>(num_positions) * 2 * half);
  for (int64_t position = 0; position < num_positions; ++position) {
    float* row = table.data() + static_cast<size_t>(position) * 2 * half;
    for (size_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position) * frequencies[i];
      const auto exact = static_cast<long double>(angle);
      row[i] = rounded(std::cos(angle), [&] { return std::cos(exact); });
      row[half + i] = rounded(std::sin(angle), [&] { return std::sin(exact); });
    }
  }
  return table;
}

}  // namespace rollpack::rollout
