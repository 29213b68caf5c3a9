// What both attention kernels, that of bf16 and that of f32, have in common: which rows an item
// has, what they see, and how the states of chunks are merged. Included by .cu files.
#pragma once

#include "kernels/cuda/arrivals.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/simt.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {

// Softmax state of some keys of a row: the largest score and the sum of exp(score - max).
struct SoftmaxState {
  float max;
  float sum;
};

// How what came before and a chunk are weighed when they are merged.
struct MergeWeights {
  float before;
  float chunk;
};

// Merges a chunk into `state`; before the first chunk its max is -infinity and its sum 0. A chunk
// without a visible key (max -infinity) must be skipped by the caller.
__device__ __forceinline__ MergeWeights merge_states(SoftmaxState& state, SoftmaxState chunk) {
  const float max = fmaxf(state.max, chunk.max);
  const MergeWeights weights = {exp_f32(state.max - max), exp_f32(chunk.max - max)};
  state = {max, fmaf(state.sum, weights.before, chunk.sum * weights.chunk)};
  return weights;
}

__device__ __forceinline__ float merge_sums(float before, float chunk, MergeWeights weights) {
  return fmaf(before, weights.before, chunk * weights.chunk);
}

// Chunk states in the workspace: sums [states][H][row_stride], then SoftmaxState [states][H], then
// how many states of a row, of whom it has the first, are there: [states][head ranges].
struct ChunkStates {
  float* sums;
  SoftmaxState* softmax;
  int32_t* arrivals;
};

__device__ __forceinline__ ChunkStates chunk_states(const AttentionInputs& in) {
  const int64_t num_heads = static_cast<int64_t>(in.work.max_states) * in.H;
  auto* const sums = static_cast<float*>(in.workspace);
  auto* const softmax = reinterpret_cast<SoftmaxState*>(sums + num_heads * in.cache.row_stride);
  return {sums, softmax, reinterpret_cast<int32_t*>(softmax + num_heads)};
}

// The heads that one block works on: blockIdx.y counts KV heads and, where more heads share one
// than an item has rows, parts of its heads.
struct HeadRange {
  int32_t kv_head;
  int32_t first;  // query head
  int32_t count;
};

ROLLPACK_HOST_DEVICE inline int32_t head_parts(int32_t group) {
  return (group + kItemRows - 1) / kItemRows;
}

__device__ __forceinline__ HeadRange head_range(const AttentionInputs& in, int32_t y) {
  const int32_t group = in.H / in.cache.G, parts = head_parts(group);
  const int32_t kv_head = y / parts, first = (y % parts) * kItemRows;
  const int32_t left = group - first;
  return {kv_head, kv_head * group + first, left < kItemRows ? left : kItemRows};
}

// One row of an item's products, one of its query rows and heads. Rows past the item's see nothing.
struct ItemRow {
  int32_t row;  // of the step, or -1
  int32_t head;
  int32_t begin;  // visible keys [begin, end), absolute positions
  int32_t end;
};

// Keys that are seen: [begin, end), absolute positions.
struct KeyRange {
  int32_t begin;
  int32_t end;
};

__device__ __forceinline__ KeyRange row_keys(const AttentionInputs& in, int32_t row) {
  const int32_t end = in.rows.positions[row] + 1;
  return {in.window > 0 && end > in.window ? end - in.window : 0, end};
}

__device__ __forceinline__ ItemRow item_row(const AttentionInputs& in, const AttentionItem& item,
                                            const HeadRange& heads, int32_t index) {
  const int32_t query = index / heads.count;
  if (query >= item.num_rows) return {-1, 0, 0, 0};
  const int32_t row = in.work.item_rows[item.first_row + query];
  const KeyRange keys = row_keys(in, row);
  return {row, heads.first + index % heads.count, keys.begin, keys.end};
}

// Keys that some row of an item sees. Rows of an item ascend within a sequence, and siblings see
// their shared chunks whole.
__device__ __forceinline__ KeyRange item_keys(const AttentionInputs& in,
                                              const AttentionItem& item) {
  KeyRange keys = {0x7fffffff, 0};
  for (int32_t i = 0; i < item.num_rows; ++i) {
    const KeyRange own = row_keys(in, in.work.item_rows[item.first_row + i]);
    keys.begin = own.begin < keys.begin ? own.begin : keys.begin;
    keys.end = own.end > keys.end ? own.end : keys.end;
  }
  return keys;
}

__device__ __forceinline__ KeyRange chunk_keys(const KeyRange& all, int32_t chunk) {
  const int32_t first = chunk * kChunkKeys, last = first + kChunkKeys;
  return {all.begin > first ? all.begin : first, all.end < last ? all.end : last};
}

// First chunk of an item that some row of it sees.
__device__ __forceinline__ int32_t first_chunk(const AttentionItem& item, const KeyRange& keys) {
  const int32_t first = keys.begin / kChunkKeys;
  return first > item.begin_chunk ? first : item.begin_chunk;
}

// State in which an item's row keeps this chunk.
__device__ __forceinline__ int64_t state_index(const AttentionInputs& in, const ItemRow& row,
                                               int32_t chunk) {
  return static_cast<int64_t>(in.work.row_states[row.row] + chunk) * in.H + row.head;
}

// Chunks [begin, end) that a row sees some key of.
struct ChunkRange {
  int32_t begin;
  int32_t end;
};

__device__ __forceinline__ ChunkRange seen_chunks(const KeyRange& keys) {
  return {keys.begin / kChunkKeys, (keys.end - 1) / kChunkKeys + 1};
}

// One element of a row and head: its stored chunks merged left to right, by the same arithmetic as
// where they are merged at once.
template <class Element>
__device__ __forceinline__ void merge_chunks(const AttentionInputs& in, int32_t row, int32_t head,
                                             int32_t column) {
  const ChunkStates stored = chunk_states(in);
  const ChunkRange chunks = seen_chunks(row_keys(in, row));
  SoftmaxState state = {-infinity_f32(), 0.0f};
  float o = 0;
  ROLLPACK_UNROLL(1)
  for (int32_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const int64_t at = static_cast<int64_t>(in.work.row_states[row] + chunk) * in.H + head;
    const MergeWeights weights = merge_states(state, stored.softmax[at]);
    o = merge_sums(o, stored.sums[at * in.cache.row_stride + column], weights);
  }
  store_rounded(o / state.sum, static_cast<Element*>(in.out) + row * in.out_stride +
                                   head * in.cache.K + column);
}

// Behind the stores of an item's states: merges those of its rows that have all of theirs now, for
// the heads of the block. is_complete: [kItemRows] in shared memory, free behind the next barrier.
template <class Element>
__device__ void merge_complete_rows(const AttentionInputs& in, const AttentionItem& item,
                                    const HeadRange& heads, int32_t* is_complete) {
  publish_stores();
  if (threadIdx.x < static_cast<unsigned>(item.num_rows)) {
    const int32_t row = in.work.item_rows[item.first_row + static_cast<int32_t>(threadIdx.x)];
    const ChunkRange seen = seen_chunks(row_keys(in, row));
    const int32_t begin = seen.begin > item.begin_chunk ? seen.begin : item.begin_chunk;
    const int32_t end = seen.end < item.end_chunk ? seen.end : item.end_chunk;
    int32_t* const counter = chunk_states(in).arrivals +
                             static_cast<int64_t>(in.work.row_states[row]) * gridDim.y + blockIdx.y;
    is_complete[threadIdx.x] =
        begin < end && arrive(counter, end - begin, seen.end - seen.begin) ? 1 : 0;
  }
  __syncthreads();
  see_stores();
  ROLLPACK_UNROLL(1)
  for (int32_t i = 0; i < item.num_rows; ++i) {
    if (is_complete[i] == 0) continue;
    const int32_t row = in.work.item_rows[item.first_row + i];
    ROLLPACK_UNROLL(1)
    for (int32_t at = static_cast<int32_t>(threadIdx.x); at < heads.count * in.cache.K;
         at += static_cast<int32_t>(blockDim.x)) {
      merge_chunks<Element>(in, row, heads.first + at / in.cache.K, at % in.cache.K);
    }
  }
}

void attention_bf16(Stream stream, const AttentionInputs& inputs);
void attention_f32(Stream stream, const AttentionInputs& inputs);

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
