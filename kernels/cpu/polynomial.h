// exp in f32 and log in f64 as fixed sequences of fused multiply-adds: the C library's differ
// between versions and machines. The vector paths run the f32 sequence lane by lane, so a scalar
// and a lane agree in every bit.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace rollpack::kernels::cpu {

// exp(x) = 2^n (1 + r + r^2 q(r)) with n = round(x / ln 2) and r = x - n ln 2 in two steps. q is
// the degree-4 minimax fit on |r| <= ln 2 / 2; with exact arithmetic the relative error is 3.1e-9.
inline constexpr float kExpLog2e = 0x1.715476p+0f;
inline constexpr float kExpRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
inline constexpr float kExpLn2High = 0x1.62e4p-1f;  // 15 bits, so that n * kExpLn2High is exact
inline constexpr float kExpLn2Low = 0x1.7f7d1cp-20f;
inline constexpr float kExpQ0 = 0x1.fffffcp-2f;
inline constexpr float kExpQ1 = 0x1.555492p-3f;
inline constexpr float kExpQ2 = 0x1.5558f2p-5f;
inline constexpr float kExpQ3 = 0x1.1239e2p-7f;
inline constexpr float kExpQ4 = 0x1.6a2432p-10f;
inline constexpr float kExpCutoff = -87.0f;     // below: 0. exp(-87) = 1.6e-38 is still normal
inline constexpr float kExpOverflow = 88.722f;  // above: infinity; the largest is exp(88.7228)

// exp(x), within 1 unit in the last place. exp(0) is 1, exp(-infinity) is 0, NaN stays NaN.
inline float exp_f32(float x) {
  if (x < kExpCutoff) return 0.0f;
  if (x > kExpOverflow) return std::numeric_limits<float>::infinity();
  if (!(x == x)) return x;
  const float t = std::fmaf(x, kExpLog2e, kExpRound);
  const float n = t - kExpRound;
  const float r = std::fmaf(n, -kExpLn2Low, std::fmaf(n, -kExpLn2High, x));
  float q = std::fmaf(kExpQ4, r, kExpQ3);
  q = std::fmaf(q, r, kExpQ2);
  q = std::fmaf(q, r, kExpQ1);
  q = std::fmaf(q, r, kExpQ0);
  const float p = std::fmaf(std::fmaf(q, r, 1.0f), r, 1.0f);
  // The low bits of t are n in two's complement; the shift moves them to the exponent.
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(t) << 23));
}

// log(x) of a positive normal x, within 2 units in the last place; -infinity of 0, NaN below.
// log(m 2^e) = e ln 2 + 2 atanh(s) with s = (m - 1) / (m + 1), m in [sqrt(1/2), sqrt(2)): the
// series in s^2 <= 0.0295 needs 11 terms for 2^-60.
inline double log_f64(double x) {
  if (!(x > 0)) return x == 0 ? -std::numeric_limits<double>::infinity()
                              : std::numeric_limits<double>::quiet_NaN();
  if (x == std::numeric_limits<double>::infinity()) return x;
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  int64_t exponent = static_cast<int64_t>(bits >> 52) - 1023;
  double m = std::bit_cast<double>((bits & 0x000fffffffffffffull) | 0x3ff0000000000000ull);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++exponent;
  }
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double sum = 0.0;
  for (int term = 23; term >= 3; term -= 2) sum = (sum + 1.0 / term) * z;
  const double e = static_cast<double>(exponent);
  // ln 2 in two parts; e times the first is exact.
  return e * 0x1.62e42fee00000p-1 + (2.0 * s + (2.0 * s * sum + e * 0x1.a39ef35793c76p-33));
}

}  // namespace rollpack::kernels::cpu
