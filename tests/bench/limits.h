// The roofs that the benchmarks report against, measured in the same process: each at its first use
// and again after the benchmarks, the larger counts.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/tensor.h"

namespace rollpack::bench {

enum class Limit : uint8_t { kBF16Peak, kF32Peak, kYmmPeak, kReadBandwidth };

// "bf16 peak", "read", ...
const char* limit_name(Limit limit);

// FLOP/s, or bytes/s read, of `num_threads` threads. Measures where this process has not yet (1 s
// for a peak). In a smoke run every limit is 1: nothing is measured.
double limit_of(Limit limit, int num_threads);

// Measures once more what limit_of() has returned so far and keeps the larger ones.
// Returns: the largest ratio between the two, 1 where nothing was measured.
double measure_limits_again();

// The peak that a path's products are held to: of bf16 pairs, f32 in the widest registers, or ymm.
Limit peak_of(kernels::cpu::Isa isa, DType dtype);

}  // namespace rollpack::bench
