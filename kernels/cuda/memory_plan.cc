#include "kernels/cuda/memory_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "kernels/base/error.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/device_communicator.h"
#include "kernels/cuda/graph_buckets.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/lm_head.h"
#include "kernels/cuda/step_memory.h"
#include "kernels/step/check_shape.h"

namespace rollpack::kernels::cuda {

int32_t kv_row_stride(const ModelShape& shape) {
  return static_cast<int32_t>((shape.K + 15) / 16 * 16);
}

int64_t kv_page_bytes(const ModelShape& shape) {
  return shape.L * shape.G * 2 * kPageTokens * kv_row_stride(shape) * dtype_bytes(shape.dtype);
}

int64_t estimated_weight_bytes(const ModelShape& s, ReplicaRank at) {
  const HeadShard heads = head_shard(s.H, s.G, at);
  const int64_t residual = column_shard(s.D, at).size(), gated = column_shard(s.F, at).size();
  const int64_t layer = (heads.query.size() + 2 * heads.kv.size()) * s.K * s.D +
                        residual * s.H * s.K + 2 * gated * s.D + residual * s.F;
  return (vocabulary_shard(s.V, at).size() * s.D + s.L * layer) * dtype_bytes(s.dtype) +
         (2 * s.L + 1) * s.D * 4;
}

int64_t step_array_bytes(const BackendOptions& options) {
  constexpr int64_t kTablePages = 24576 / kPageTokens;
  const std::vector<int32_t> buckets = graph_buckets(options);
  const int64_t rows = buckets.empty() ? 0 : buckets.back();
  return (int64_t{1} << 20) + rows * kTablePages * static_cast<int64_t>(sizeof(int32_t));
}

namespace {

// A row: residual, its norm, Q K V in f32, rotated Q, attention output, gated F, its place in the
// head's rows.
int64_t activation_bytes(const ModelShape& s, const ModelShape& held,
                         const BackendOptions& options) {
  const int64_t element = dtype_bytes(s.dtype);
  const int64_t row = s.D * (8 + element) + (held.H + 2 * held.G) * s.K * 4 +
                      (held.H + s.H) * s.K * element + s.F * element;
  return row * options.max_num_batched_tokens;
}

int64_t step_bytes(const ModelShape& shape, const BackendOptions& options) {
  const int64_t slot = static_cast<int64_t>(sizeof(SlotState)) + (shape.V + 31) / 32 * 4;
  // Ids, positions, sequence and head entries of a row.
  const int64_t row = 16 * 4 + static_cast<int64_t>(sizeof(HeadResult));
  return slot * options.max_num_seqs +
         kMaxStepsUnderWay * (row * options.max_num_batched_tokens + step_array_bytes(options));
}

[[noreturn]] void fail_too_little(const DeviceMemoryPlan& plan, int64_t available) {
  throw Error({.code = ErrorCode::kResourceExhausted,
               .field = "device memory",
               .value = fmt::format("{} bytes", available),
               .allowed = fmt::format("at least {} bytes", plan.total()),
               .message = fmt::format(
                   "weights {}, activations {}, workspaces {}, steps {}, graphs {}, KV cache {}; "
                   "lower engine.kv_cache_memory or engine.max_num_batched_tokens{}",
                   plan.weights, plan.activations, plan.workspaces, plan.steps, plan.graphs,
                   plan.kv_cache, plan.graphs > 0 ? ", or set engine.enforce_eager" : "")});
}

}  // namespace

DeviceMemoryPlan plan_memory(const ModelShape& shape, const BackendOptions& options,
                             int64_t weight_bytes, const DeviceMemoryLimits& limits) {
  const ModelShape held = held_shape(shape, options.at());
  const int64_t page_bytes = kv_page_bytes(held);
  const int64_t available =
      std::min(static_cast<int64_t>(static_cast<double>(limits.total_bytes) * kMemoryUtilisation),
               limits.free_bytes);
  DeviceMemoryPlan plan{.weights = weight_bytes,
                        .activations = activation_bytes(shape, held, options),
                        .workspaces = kLinearWorkspaceBytes + attention_workspace_bytes(held) +
                                      lm_head_workspace_bytes(shape, options) +
                                      (options.at().size > 1 ? kExchangeBytes + kNcclBytes : 0),
                        .steps = step_bytes(shape, options),
                        .graphs = graph_bytes(shape, options)};
  int64_t kv_bytes = options.kv_cache_bytes;
  if (kv_bytes > 0 && kv_bytes < page_bytes) {
    throw Error({.code = ErrorCode::kResourceExhausted,
                 .field = "engine.kv_cache_memory",
                 .value = fmt::format("{} bytes", kv_bytes),
                 .allowed = fmt::format("at least {} bytes", page_bytes),
                 .message = fmt::format("one page holds {} tokens of all {} layers", kPageTokens,
                                        shape.L)});
  }
  const bool is_explicit = kv_bytes > 0;
  if (!is_explicit) {
    // Staging on the device is worth up to half of what is left.
    const int64_t left = available - plan.total();
    kv_bytes = std::max(page_bytes, left - weight_bytes >= left / 2 ? left - weight_bytes : left);
  }
  const int64_t num_pages =
      std::min<int64_t>(kv_bytes / page_bytes, std::numeric_limits<int32_t>::max() / kPageTokens);
  plan.num_pages = static_cast<int32_t>(num_pages);
  plan.kv_cache = num_pages * page_bytes;
  if (plan.total() > available) fail_too_little(plan, available);
  if (plan.total() + weight_bytes <= available) plan.staging = weight_bytes;
  return plan;
}

}  // namespace rollpack::kernels::cuda
