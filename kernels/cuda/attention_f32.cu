// Attention of f32 models: one fma a key and element, without tensor cores. Items and states are
// those of attention_bf16.cu; a block takes the rows of its item one after the other.
#include <cmath>

#include "kernels/cuda/attention_rows.h"
#include "kernels/cuda/reduce.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / static_cast<int>(kWarp);
constexpr int kKeysPerThread = kChunkKeys / kThreads;

struct Shared {
  float q[kMaxHeadWidth];
  float p[kChunkKeys];
  float warp_max[kWarps];
  float warp_sum[kWarps];
  int32_t is_complete[kItemRows];
};

// Keys or values of one token.
__device__ __forceinline__ const float* token_row(const AttentionInputs& in,
                                                  const AttentionItem& item, int32_t kv_head,
                                                  int32_t position, bool is_value) {
  const int32_t page = in.rows.page_tables[item.page_table + position / kPageTokens];
  const float* const block = is_value ? in.cache.values<float>(in.layer, page, kv_head)
                                      : in.cache.keys<float>(in.layer, page, kv_head);
  return block + (position % kPageTokens) * in.cache.row_stride;
}

// Weights of the keys of a chunk that a row sees, into shared.p; the chunk's state comes back.
// Order of the sum: a thread's two keys, lanes by halves, then warps ascending.
__device__ SoftmaxState soften_chunk(const AttentionInputs& in, const AttentionItem& item,
                                     int32_t kv_head, const KeyRange& seen, int32_t chunk,
                                     float scale, Shared& shared) {
  const auto thread = static_cast<int>(threadIdx.x);
  float s[kKeysPerThread];
  float max = -infinity_f32();
  for (int i = 0; i < kKeysPerThread; ++i) {
    const int32_t position = chunk * kChunkKeys + i * kThreads + thread;
    s[i] = -infinity_f32();
    if (position >= seen.begin && position < seen.end) {
      const float* const key = token_row(in, item, kv_head, position, false);
      float sum = 0;
      for (int k = 0; k < in.cache.K; ++k) sum = fmaf(shared.q[k], key[k], sum);
      s[i] = sum * scale;
    }
    max = fmaxf(max, s[i]);
  }
  max = warp_max(max);
  if (thread % static_cast<int>(kWarp) == 0)
    shared.warp_max[thread / static_cast<int>(kWarp)] = max;
  __syncthreads();
  for (const float of_warp : shared.warp_max) max = fmaxf(max, of_warp);
  float sum = 0;
  for (int i = 0; i < kKeysPerThread; ++i) {
    const float p = exp_f32(s[i] - max);
    shared.p[i * kThreads + thread] = p;
    sum += p;
  }
  sum = warp_sum(sum);
  if (thread % static_cast<int>(kWarp) == 0)
    shared.warp_sum[thread / static_cast<int>(kWarp)] = sum;
  __syncthreads();
  float total = shared.warp_sum[0];
  for (int w = 1; w < kWarps; ++w) total += shared.warp_sum[w];
  return {max, total};
}

// One row of an item.
__device__ void attend_row(const AttentionInputs& in, const AttentionItem& item,
                           const HeadRange& heads, int32_t index, float scale, Shared& shared) {
  const ChunkStates stored = chunk_states(in);
  const auto thread = static_cast<int>(threadIdx.x);
  const int K = in.cache.K;
  const ItemRow row = item_row(in, item, heads, index);
  const int64_t at = (static_cast<int64_t>(row.row) * in.H + row.head) * K;
  __syncthreads();  // the row before is done
  if (thread < K) shared.q[thread] = static_cast<const float*>(in.q)[at + thread];
  __syncthreads();
  SoftmaxState state = {-infinity_f32(), 0.0f};
  float o = 0;
  const KeyRange all = {row.begin, row.end};
  for (int32_t chunk = first_chunk(item, all); chunk < item.end_chunk; ++chunk) {
    const KeyRange seen = chunk_keys(all, chunk);
    if (seen.begin >= seen.end) break;  // rows that stand before the chunk
    const SoftmaxState found = soften_chunk(in, item, heads.kv_head, seen, chunk, scale, shared);
    float sum = 0;
    if (thread < K) {
      for (int32_t position = seen.begin; position < seen.end; ++position) {
        const float* const value = token_row(in, item, heads.kv_head, position, true);
        sum = fmaf(shared.p[position - chunk * kChunkKeys], value[thread], sum);
      }
    }
    if (item.is_direct != 0) {
      o = merge_sums(o, sum, merge_states(state, found));
    } else {
      const int64_t target = state_index(in, row, chunk);
      if (thread < K) stored.sums[target * in.cache.row_stride + thread] = sum;
      if (thread == 0) stored.softmax[target] = found;
    }
    __syncthreads();  // the next chunk's weights take their place
  }
  if (item.is_direct == 0 || thread >= K) return;
  static_cast<float*>(in.out)[row.row * in.out_stride + row.head * K + thread] = o / state.sum;
}

__global__ void __launch_bounds__(kThreads, 4) attention_rows(AttentionInputs in, float scale) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const HeadRange heads = head_range(in, static_cast<int32_t>(blockIdx.y));
  const int32_t num_items = in.rows.scalars->num_items;
  for (int32_t i = static_cast<int32_t>(blockIdx.x); i < num_items;
       i += static_cast<int32_t>(gridDim.x)) {
    const AttentionItem item = in.work.items[i];
    for (int32_t index = 0; index < item.num_rows * heads.count; ++index) {
      attend_row(in, item, heads, index, scale, shared);
    }
    if (item.is_direct == 0) merge_complete_rows<float>(in, item, heads, shared.is_complete);
  }
}

}  // namespace

void attention_f32(Stream stream, const AttentionInputs& in) {
  const auto parts = static_cast<uint32_t>(head_parts(in.H / in.cache.G));
  launch(attention_rows,
         {.kernel = "attention_rows",
          .grid = {.x = static_cast<uint32_t>(in.work.item_blocks),
                   .y = static_cast<uint32_t>(in.cache.G) * parts},
          .block = kThreads,
          .shared_bytes = sizeof(Shared)},
         stream, in, 1.0f / std::sqrt(static_cast<float>(in.cache.K)));
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
