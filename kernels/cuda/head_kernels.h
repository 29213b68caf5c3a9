// What the files of the head's kernels call of each other, and the reductions they share. Included
// by .cu files.
#pragma once

#include "kernels/cuda/head_memory.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/simt.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {

// One group of a step's head rows, as every kernel of the head gets it.
struct HeadWork {
  LmHeadInputs in;
  HeadMemory memory;
  HeadGroup group;
  int32_t max_rows;

  ROLLPACK_HOST_DEVICE int64_t V() const { return in.weight.N; }
};

// Lanes by halves: a fixed tree.
__device__ __forceinline__ float warp_max(float x) {
  ROLLPACK_UNROLL_WHOLLY
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}
template <class Value>
__device__ __forceinline__ Value warp_sum(Value x) {
  ROLLPACK_UNROLL_WHOLLY
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// Statistics of all panels of the group's rows, in every distribution that a query asks for; logits
// of scored tokens and of rows that keep them.
void vocabulary_panels_bf16(Stream stream, const HeadWork& work);
void vocabulary_panels_f32(Stream stream, const HeadWork& work);
// Draws of the queries that are cut or banned.
void draw_truncated(Stream stream, const HeadWork& work);
// Draws the others, and writes the results of all.
void finish_queries(Stream stream, const HeadWork& work);
// What counts of the step's draws; slots go on.
void advance_slots(Stream stream, const LmHeadInputs& in);

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
