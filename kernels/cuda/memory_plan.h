// What the memory of a device is for, as a pure function of the model, the options and the device:
// start either fits or fails with the bytes it needs.
#pragma once

#include <cstdint>

#include "kernels/backend.h"

namespace rollpack::kernels::cuda {

// The part of a device's memory that is planned with; the rest is for the driver, for code and for
// what allocators lose between blocks.
inline constexpr double kMemoryUtilisation = 0.92;

struct DeviceMemoryLimits {
  int64_t total_bytes = 0;
  int64_t free_bytes = 0;  // at start: what others have taken is not ours to plan with
};

// Bytes. Their sum is at most utilisation x total, and at most what is free.
struct DeviceMemoryPlan {
  int64_t weights = 0;      // the set in use
  int64_t staging = 0;      // a second set on the device while weights change; 0: on the host
  int64_t activations = 0;  // what the forward pass holds for max_num_batched_tokens rows
  int64_t workspaces = 0;   // partial sums, attention, the head, exchanges between ranks
  int64_t steps = 0;        // slots, stop sets, a step's rows and results
  int64_t graphs = 0;       // of decoding steps, at most; graph_bytes()
  int64_t kv_cache = 0;     // whole pages
  int32_t num_pages = 0;

  int64_t total() const {
    return weights + staging + activations + workspaces + steps + graphs + kv_cache;
  }
};

// Bytes of K and V of kPageTokens tokens, all layers, of the KV heads that the shape has.
int64_t kv_page_bytes(const ModelShape& shape);
// Elements of a token's K or V of one head in memory: K, rounded up to 16.
int32_t kv_row_stride(const ModelShape& shape);
// Bytes of one set of weights of a model with a tied head and no biases, those that a rank holds of
// them: what is known of a model before its weights are declared.
int64_t estimated_weight_bytes(const ModelShape& shape, ReplicaRank at = {});

// Bytes of a step's arrays that never move: 1 MiB for rows and work lists, and for every row that a
// graph may have a page table of 24,576 tokens. Steps that need more have them elsewhere and are no
// graphs.
int64_t step_array_bytes(const BackendOptions& options);

// `shape` is the whole model's, of which the rank options.at() holds a part: its weights, KV pages,
// heads and panels. Activations that ranks gather are whole on every one, and so are the logits of
// truncated samples.
// `options.kv_cache_bytes` above 0 wins: KV takes the whole pages in it. 0: KV takes all that is
// left. Weights are staged on the device where both fit, else on the host.
// Errors: resource_exhausted naming the bytes needed and the bytes there are; where not even one
// page fits into kv_cache_bytes, the bytes of a page.
DeviceMemoryPlan plan_memory(const ModelShape& shape, const BackendOptions& options,
                             int64_t weight_bytes, const DeviceMemoryLimits& limits);

}  // namespace rollpack::kernels::cuda
