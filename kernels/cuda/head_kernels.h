// What the files of the head's kernels call of each other. Included by .cu files.
#pragma once

#include "kernels/cuda/head_memory.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/reduce.h"
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
