// Element types that weights, activations and columns come in, and bf16 rounding.
#pragma once

#include <bit>
#include <cstdint>
#include <string_view>

namespace rollpack {

enum class DType : uint8_t { kF32, kBF16, kF16, kI32, kI64, kU8 };

int64_t dtype_bytes(DType dtype);
// "float32", "bfloat16", ... as PyTorch and the YAML files say it.
std::string_view dtype_name(DType dtype);

// bf16 is held as its 16 bits.
inline float bf16_to_f32(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Rounds to nearest even; a subnormal input becomes a zero of its sign, NaN stays a quiet NaN.
// Integer arithmetic, so that no rounding mode or FTZ flag changes it.
inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  if (magnitude < 0x00800000u) return static_cast<uint16_t>((bits >> 16) & 0x8000u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// IEEE half precision to f32, exact; subnormal halves become normal floats.
float f16_to_f32(uint16_t bits);

}  // namespace rollpack
