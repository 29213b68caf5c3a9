#include <algorithm>

#include "kernels/cuda/attention.h"

namespace rollpack::kernels::cuda {
namespace {

// 64 MiB hold 4,000 states of 32 heads of 128: chunks of 256 keys for a million cached tokens that
// are attended to by few rows. Where there are many rows, they fill the device uncut.
constexpr int64_t kStateBytes = int64_t{64} << 20;
constexpr int64_t kMaxStates = 8192;

// Sums of K (rows are padded to 16, as those of the cache), maximum and weight, of every head; and
// how many states of a row are there, of whom it has the first: a number for each head at most.
int64_t state_bytes(int64_t num_heads, int64_t head_width) {
  return num_heads * ((head_width + 15) / 16 * 16 + 3) * static_cast<int64_t>(sizeof(float));
}

int64_t max_states(const ModelShape& shape) {
  return std::clamp<int64_t>(kStateBytes / state_bytes(shape.H, shape.K), 1, kMaxStates);
}

}  // namespace

AttentionLimits attention_limits(const ModelShape& shape) {
  return {.group = static_cast<int32_t>(shape.H / shape.G),
          .num_kv_heads = static_cast<int32_t>(shape.G),
          .page_tokens = kPageTokens,
          .max_states = static_cast<int32_t>(max_states(shape))};
}

int64_t attention_workspace_bytes(int64_t max_states, int64_t num_heads, int64_t head_width) {
  return max_states * state_bytes(num_heads, head_width);
}

int64_t attention_workspace_bytes(const ModelShape& shape) {
  return attention_workspace_bytes(max_states(shape), shape.H, shape.K);
}

}  // namespace rollpack::kernels::cuda
