// How blocks of a launch hand work over without another launch: each counts itself in once its part
// is stored, and the one that comes last goes on with the parts of all. Nobody waits, so blocks may
// run in any order and number, and who comes last changes no bit: what it does is a function of the
// parts. Counters are 0 between launches. Included by .cu files only.
// Source: CUDA C++ Programming Guide, "Memory fence functions", its example of a sum over blocks.
#pragma once

#include "kernels/cuda/simt.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {

// All threads of a block call it behind their stores, before one of them counts the block in.
__device__ __forceinline__ void publish_stores() {
  __threadfence();
  __syncthreads();
}

// Counts `parts` of `all` in; whether they were the last. The counter is 0 again then.
__device__ __forceinline__ bool arrive(int32_t* counter, int32_t parts, int32_t all) {
  const bool is_last = atomicAdd(counter, parts) + parts == all;
  if (is_last) *counter = 0;
  return is_last;
}

// All threads of the block that came last call it behind a barrier that follows arrive(), before
// they read what others have stored.
__device__ __forceinline__ void see_stores() {
  __threadfence();
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
