// Holds an instruction set to the numerics contract before it computes anything: a processor, a
// virtual machine or a compiler whose products, rounding or flushing differ would break the promise
// of equal bits without a sign.
#pragma once

#include <span>
#include <string>

#include "kernels/cpu/kernel_table.h"

namespace rollpack::kernels::cpu {

// Products and roundings that are compared: bf16 pairs, f32 elements, accumulators.
inline constexpr int kCheckedTriples = 4096;

// Whether `kernels` gives the bits of scalar code on kCheckedTriples random and subnormal triples
// (a, b, accumulator): the sum of a bf16 pair and of an f32 product, both rounded to bf16. A NaN
// equals a NaN. Takes less than a millisecond on a vector path.
bool agrees_with_scalar(const KernelTable& kernels);

// Whether AMX, which this machine has, gives the bits of amx_sum() on such rows and panels of every
// length up to some slices. A few milliseconds.
bool amx_agrees_with_scalar();

struct PathChoice {
  const KernelTable* kernels = nullptr;
  std::string refused;  // names of the paths before it, whose bits were wrong; empty: none
};

// The first of `candidates` (best first, at least one) that agrees with scalar code. The last one
// is taken unchecked: it is the plain C++ that the others are compared with.
PathChoice choose_path(std::span<const KernelTable* const> candidates);

}  // namespace rollpack::kernels::cpu
