// Numbers as memory holds them: every read is exact, every write rounds to the dtype of its memory.
// A bf16 write rounds f64 to f32 to bf16; the first step can move a tie of the second, which costs
// at most 2^-24 of the value more than a single rounding.
#pragma once

#include "kernels/base/dtype.h"
#include "kernels/base/error.h"

namespace rollpack::kernels::reference {

struct BF16 {
  uint16_t bits = 0;
};

inline double read_number(float value) {
  return value;
}
inline double read_number(BF16 value) {
  return bf16_to_f32(value.bits);
}
inline void write_number(float& target, double value) {
  target = static_cast<float>(value);
}
inline void write_number(BF16& target, double value) {
  target.bits = f32_to_bf16(static_cast<float>(value));
}

// Calls visit(pointer) with `data` as BF16* or float*.
template <class Visit>
void visit_numbers(DType dtype, void* data, Visit&& visit) {
  if (dtype == DType::kF32) return visit(static_cast<float*>(data));
  if (dtype == DType::kBF16) return visit(static_cast<BF16*>(data));
  fail_invariant("an op of the reference backend got memory that is neither float32 nor bfloat16");
}

template <class Visit>
void visit_numbers(DType dtype, const void* data, Visit&& visit) {
  if (dtype == DType::kF32) return visit(static_cast<const float*>(data));
  if (dtype == DType::kBF16) return visit(static_cast<const BF16*>(data));
  fail_invariant("an op of the reference backend got memory that is neither float32 nor bfloat16");
}

}  // namespace rollpack::kernels::reference
