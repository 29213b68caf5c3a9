// Causal attention of a step's rows over their pages.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/launch_shape.h"
#include "kernels/cuda/step_memory.h"

namespace rollpack::kernels::cuda {

// One unit of work, derived from the plan on the host and uploaded with the step's rows.
struct AttentionItem {
  int32_t sequence = 0;
  int32_t first_row = 0;  // of the step
  int32_t num_rows = 0;
};

// The work of a step, in the order in which blocks should take it.
std::vector<AttentionItem> attention_items(const StepPlan& plan, const ModelShape& shape);

// Bytes of the workspace that any step within `options` needs.
int64_t attention_workspace_bytes(const ModelShape& shape, const BackendOptions& options);

struct AttentionInputs {
  StepRows rows;
  KvCache cache;
  const AttentionItem* items = nullptr;  // [num_items]
  int32_t num_items = 0;
  int32_t layer = 0;
  int32_t window = 0;  // key j is visible to row i iff i - j < window; 0: all keys up to i
  int32_t H = 0;       // query heads; G and K are the cache's
  DType dtype = DType::kBF16;
  const void* q = nullptr;    // [T, H K] dtype, rows not padded
  void* out = nullptr;        // [T, H K] dtype; a pad row's is 0
  void* workspace = nullptr;  // attention_workspace_bytes()
};

}  // namespace rollpack::kernels::cuda
