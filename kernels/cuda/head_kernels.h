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

  ROLLPACK_HOST_DEVICE int64_t V() const { return in.part.V; }
  ROLLPACK_HOST_DEVICE int64_t held_columns() const { return in.weight.N; }
  // Of query q, where it has one of its own.
  ROLLPACK_HOST_DEVICE int32_t own_distribution(int32_t q) const { return group.num_rows + q; }
  ROLLPACK_HOST_DEVICE bool holds_block(int64_t block) const {
    return block >= memory.first_block && block < memory.first_block + memory.held_blocks;
  }
  ROLLPACK_HOST_DEVICE bool holds_token(int32_t token) const {
    return token >= in.part.held.begin && token < in.part.held.end;
  }
};

// Statistics of all panels of the group's rows, in every distribution that a query asks for; logits
// of scored tokens and of rows that keep them.
void vocabulary_panels_bf16(Stream stream, const HeadWork& work);
void vocabulary_panels_f32(Stream stream, const HeadWork& work);
// Draws of the queries that are cut or banned.
void draw_truncated(Stream stream, const HeadWork& work);
// Draws the others, and writes the results of all.
void finish_queries(Stream stream, const HeadWork& work);
// The same in two, where several ranks hold the vocabulary: the tokens that this one holds, and the
// results once all have them.
void choose_tokens(Stream stream, const HeadWork& work);
void conclude_queries(Stream stream, const HeadWork& work);
// What counts of the step's draws; slots go on.
void advance_slots(Stream stream, const LmHeadInputs& in);

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
