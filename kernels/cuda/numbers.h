// Roundings, exp and log as fixed sequences of IEEE operations, the same on the host, in the
// emulation and on a device (compiled with -fmad=false: only what says fmaf is fused). bf16 is held
// as its 16 bits, so that elements of models are uint16_t or float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/cuda/host_device.h"

namespace rollpack::kernels::cuda {

template <class To, class From>
ROLLPACK_HOST_DEVICE inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

ROLLPACK_HOST_DEVICE inline float bf16_value(uint16_t bits) {
  return bits_as<float>(static_cast<uint32_t>(bits) << 16);
}

// As f32_to_bf16 of kernels/base/dtype.h: to nearest even, subnormals to zero, NaN stays NaN.
ROLLPACK_HOST_DEVICE inline uint16_t rounded_to_bf16(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  if (magnitude < 0x00800000u) return static_cast<uint16_t>((bits >> 16) & 0x8000u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Two bf16 as mma fragments hold them: the first in the low half.
ROLLPACK_HOST_DEVICE inline uint32_t bf16_pair(float first, float second) {
  return rounded_to_bf16(first) | static_cast<uint32_t>(rounded_to_bf16(second)) << 16;
}

ROLLPACK_HOST_DEVICE inline float value_of(float element) {
  return element;
}
ROLLPACK_HOST_DEVICE inline float value_of(uint16_t element) {
  return bf16_value(element);
}
ROLLPACK_HOST_DEVICE inline void store_rounded(float value, float* target) {
  *target = value;
}
ROLLPACK_HOST_DEVICE inline void store_rounded(float value, uint16_t* target) {
  *target = rounded_to_bf16(value);
}

ROLLPACK_HOST_DEVICE inline bool is_finite(float value) {
  return (bits_as<uint32_t>(value) & 0x7f800000u) != 0x7f800000u;
}

ROLLPACK_HOST_DEVICE inline float infinity_f32() {
  return bits_as<float>(0x7f800000u);
}

// exp(x), within 1 unit in the last place; exp(0) is 1, below -87 it is 0, NaN stays NaN.
// exp(x) = 2^n (1 + r + r^2 q(r)) with n = round(x / ln 2), r = x - n ln 2 in two steps and q the
// degree-4 minimax fit on |r| <= ln 2 / 2, as on the CPU (kernels/cpu/polynomial.h).
ROLLPACK_HOST_DEVICE inline float exp_f32(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  if (x < -87.0f) return 0.0f;
  if (x > 88.722f) return infinity_f32();
  if (!(x == x)) return x;
  const float t = fmaf(x, 0x1.715476p+0f, kRound);
  const float n = t - kRound;
  const float r = fmaf(n, -0x1.7f7d1cp-20f, fmaf(n, -0x1.62e4p-1f, x));
  float q = fmaf(0x1.6a2432p-10f, r, 0x1.1239e2p-7f);
  q = fmaf(q, r, 0x1.5558f2p-5f);
  q = fmaf(q, r, 0x1.555492p-3f);
  q = fmaf(q, r, 0x1.fffffcp-2f);
  const float p = fmaf(fmaf(q, r, 1.0f), r, 1.0f);
  // The low bits of t are n in two's complement; the shift moves them to the exponent.
  return bits_as<float>(bits_as<uint32_t>(p) + (bits_as<uint32_t>(t) << 23));
}

// log(x) of a positive normal x, within 2 units in the last place; -infinity of 0, NaN below.
// log(m 2^e) = e ln 2 + 2 atanh(s) with s = (m - 1) / (m + 1), as on the CPU.
ROLLPACK_HOST_DEVICE inline double log_f64(double x) {
  constexpr uint64_t kInfinity = 0x7ff0000000000000ull;
  if (!(x > 0)) return bits_as<double>(x == 0 ? 0xfff0000000000000ull : 0x7ff8000000000000ull);
  const uint64_t bits = bits_as<uint64_t>(x);
  if (bits == kInfinity) return x;
  int64_t exponent = static_cast<int64_t>(bits >> 52) - 1023;
  double m = bits_as<double>((bits & 0x000fffffffffffffull) | 0x3ff0000000000000ull);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++exponent;
  }
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double sum = 0.0;
  for (int term = 23; term >= 3; term -= 2) sum = (sum + 1.0 / term) * z;
  const auto e = static_cast<double>(exponent);
  // ln 2 in two parts; e times the first is exact.
  return e * 0x1.62e42fee00000p-1 + (2.0 * s + (2.0 * s * sum + e * 0x1.a39ef35793c76p-33));
}

}  // namespace rollpack::kernels::cuda
