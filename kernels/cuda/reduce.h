// Sums over the threads of a warp or block as fixed trees, so that their bits depend on nothing but
// the numbers and the place of each. Included by .cu files only.
#pragma once

#include <cmath>

#include "kernels/cuda/simt.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {

// Sum over the lanes, in every lane: at each of five levels the sums of two halves are added.
// x + y is y + x, so all lanes have the same bits.
template <class Value>
__device__ __forceinline__ Value warp_sum(Value value) {
  ROLLPACK_UNROLL_WHOLLY
  for (int half = 16; half > 0; half /= 2) value += __shfl_xor_sync(kAllLanes, value, half);
  return value;
}

// The largest of the lanes' numbers, in every lane.
__device__ __forceinline__ float warp_max(float value) {
  ROLLPACK_UNROLL_WHOLLY
  for (int half = 16; half > 0; half /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, half));
  }
  return value;
}

// Sum over the threads of a block of kWarps warps, in every thread. scratch: kWarps floats of
// shared memory, free again behind the next barrier.
template <int kWarps>
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  static_assert(kWarps > 0 && (kWarps & (kWarps - 1)) == 0);
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sums[kWarps];
  for (int i = 0; i < kWarps; ++i) sums[i] = scratch[i];
  for (int half = kWarps / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
