// Inputs of the kernels whose rows are independent and small. Pointers are to device memory.
#pragma once

#include <cstdint>

#include "kernels/base/dtype.h"
#include "kernels/cuda/step_memory.h"

namespace rollpack::kernels::cuda {

// A slot to fill: the state it takes, and its stop tokens in BeginStepInputs::stop_tokens.
struct SlotFill {
  SlotState state;
  int32_t slot = 0;
  int32_t stop_begin = 0;  // state.num_stop_tokens of them
};

// Fills slots and copies pages, in the plan's order, before the rows run.
struct BeginStepInputs {
  Slots slots;
  int32_t num_fills = 0;
  const SlotFill* fills = nullptr;  // [num_fills], at most one a slot
  const int32_t* stop_tokens = nullptr;
  KvCache cache;
  int64_t num_layers = 0;
  int32_t element_bytes = 2;
  int32_t num_copies = 0;
  const PageCopy* copies = nullptr;  // [num_copies]
};

struct EmbedInputs {
  StepRows rows;
  Slots slots;
  DeviceMatrix weight;      // [tokens held, D], not gated
  int64_t first_token = 0;  // that the first row of the weight belongs to
  DType dtype = DType::kBF16;
  float* out = nullptr;  // [T, D]; zeros, the bits too, for tokens that another rank holds
};

struct RmsNormInputs {
  int64_t num_rows = 0;
  int64_t width = 0;
  float epsilon = 0;
  const float* weight = nullptr;  // [width]
  const float* in = nullptr;      // [num_rows, width]
  void* out = nullptr;            // [num_rows, width] dtype
  DType dtype = DType::kBF16;
};

struct RopeAppendInputs {
  StepRows rows;
  KvCache cache;
  int32_t layer = 0;
  int32_t H = 0;
  const float* qkv = nullptr;         // [T, (H + 2 G) K]
  const float* rope_table = nullptr;  // [positions, K]
  const float* q_norm = nullptr;      // [K] or null
  const float* k_norm = nullptr;
  float norm_epsilon = 0;
  void* q = nullptr;  // [T, H K] dtype; a pad row's is 0
  DType dtype = DType::kBF16;
};

struct GatherRowsInputs {
  HeadRows head;
  int64_t width = 0;
  const float* in = nullptr;  // [T, width]
  float* out = nullptr;       // [head.num_rows, width]
};

}  // namespace rollpack::kernels::cuda
