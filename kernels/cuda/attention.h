// Causal attention of a step's rows over their pages: what its kernels get.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/step_memory.h"

namespace rollpack::kernels::cuda {

// Widest head that the kernels hold in registers and shared memory.
inline constexpr int64_t kMaxHeadWidth = 128;

// An AttentionPlan in device memory.
struct AttentionWork {
  const AttentionItem* items = nullptr;    // StepScalars::num_items of them
  const int32_t* item_rows = nullptr;      // rows of the items
  const int32_t* row_states = nullptr;     // [T]
  const int32_t* pad_rows = nullptr;       // [num_pads]
  int32_t item_blocks = 0;                 // that take the items in turn; 0 where there are none
  int32_t num_pads = 0;
  int32_t max_states = 0;  // of attention_limits(), for which the workspace was sized

  bool operator==(const AttentionWork&) const = default;
};

struct AttentionInputs {
  StepRows rows;
  KvCache cache;
  AttentionWork work;
  int32_t layer = 0;
  int32_t window = 0;  // key j is visible to row i iff i - j < window; 0: all keys up to i
  int32_t H = 0;       // query heads; G and K are the cache's
  DType dtype = DType::kBF16;
  const void* q = nullptr;       // [T, H K] dtype, rows not padded
  void* out = nullptr;           // [T, H K] dtype, from this rank's first head; a pad row's is 0
  int64_t out_stride = 0;        // elements from row to row; H K where this rank is alone
  void* workspace = nullptr;     // attention_workspace_bytes(), zeros at first
  int64_t max_shared_bytes = 0;  // that a block of this device may have
};

// What a plan of this shape may ask for; wanted_blocks are left to the caller, who knows the
// device.
AttentionLimits attention_limits(const ModelShape& shape);

// Bytes of the states that plans within those limits store, and of what counts them.
int64_t attention_workspace_bytes(const ModelShape& shape);
int64_t attention_workspace_bytes(int64_t max_states, int64_t num_heads, int64_t head_width);

}  // namespace rollpack::kernels::cuda
