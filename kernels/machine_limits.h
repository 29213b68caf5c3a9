// What this machine can do at most, measured now: the roof that speed is reported against.
#pragma once

#include <cstdint>

#include "kernels/base/dtype.h"

namespace rollpack::kernels {

struct MachineLimits {
  double peak_flops = 0;                  // FLOP/s of multiply-adds in registers, all threads
  double read_bandwidth_bytes_per_s = 0;  // plain reads of memory in 2 MiB pages, all threads
};

// The registers that a path multiplies in.
enum class RegisterWidth { kWidest, kYmm };

// Peak: best of five 200 ms bursts of 24 register chains a thread, of the widest multiply-add this
// CPU's vectors have for `dtype` (bf16: VDPBF16PS or two FMAs a pair, whichever is faster; products
// by AMX may be above it). Bandwidth: best of five reads of 1 GiB. Takes about 2 s and, meanwhile,
// 1 GiB.
MachineLimits measure_machine_limits(DType dtype, int32_t num_threads);

// The two of them alone. kYmm: AVX2 multiply-adds, whatever else the CPU has; a pair of bf16 takes
// two of them, so both dtypes have the same peak there.
double measure_peak_flops(DType dtype, int32_t num_threads,
                          RegisterWidth width = RegisterWidth::kWidest);
double measure_read_bandwidth(int32_t num_threads);

// The same peak from the best millisecond of some 10 of each thread, whether threads ran at a time
// or not: for a line at start, not to report speed against.
double estimate_peak_flops(DType dtype, int32_t num_threads);

}  // namespace rollpack::kernels
