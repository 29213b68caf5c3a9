// The functions behind KernelSet, each defined in the .cu file of its op; included by .cu files
// only.
#pragma once

#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/simt.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {

void begin_step(Stream stream, const BeginStepInputs& inputs);
void embed(Stream stream, const EmbedInputs& inputs);
void rms_norm(Stream stream, const RmsNormInputs& inputs);
void linear(Stream stream, const LinearInputs& inputs);
void rope_append(Stream stream, const RopeAppendInputs& inputs);
void attention(Stream stream, const AttentionInputs& inputs);
void gather_rows(Stream stream, const GatherRowsInputs& inputs);
void lm_head(Stream stream, const LmHeadInputs& inputs);
void move_columns(Stream stream, const MoveColumnsInputs& inputs);

const KernelSet& kernel_set();

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
