// Logits of the head rows against the vocabulary and, without keeping the logits, what the step
// samples and scores.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cuda/launch_shape.h"
#include "kernels/cuda/step_memory.h"

namespace rollpack::kernels::cuda {

// Bytes of the workspace that any step within `options` needs.
int64_t lm_head_workspace_bytes(const ModelShape& shape, const BackendOptions& options);

struct LmHeadInputs {
  StepRows rows;
  HeadRows head;
  Slots slots;          // sampled slots take their token and go on by a position
  DeviceMatrix weight;  // [V, D], not gated
  DType dtype = DType::kBF16;
  const void* in = nullptr;   // [head.num_rows, D] dtype
  void* workspace = nullptr;  // lm_head_workspace_bytes()
};

}  // namespace rollpack::kernels::cuda
