// The table through which the host, which is compiled once, starts kernels, which are compiled
// twice: by nvcc for devices and by the host's compiler for the emulation. An entry enqueues its
// kernels on the stream and returns; errors of a launch are thrown, naming the kernel.
#pragma once

#include "kernels/cuda/attention.h"
#include "kernels/cuda/column_moves.h"
#include "kernels/cuda/launch_shape.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/lm_head.h"
#include "kernels/cuda/row_ops.h"

namespace rollpack::kernels::cuda {

struct KernelSet {
  void (*begin_step)(Stream, const BeginStepInputs&);
  void (*embed)(Stream, const EmbedInputs&);
  void (*rms_norm)(Stream, const RmsNormInputs&);
  void (*linear)(Stream, const LinearInputs&);
  void (*rope_append)(Stream, const RopeAppendInputs&);
  void (*attention)(Stream, const AttentionInputs&);
  void (*gather_rows)(Stream, const GatherRowsInputs&);
  void (*lm_head)(Stream, const LmHeadInputs&);
  void (*move_columns)(Stream, const MoveColumnsInputs&);
};

}  // namespace rollpack::kernels::cuda
