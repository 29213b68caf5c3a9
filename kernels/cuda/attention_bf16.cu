// Attention over bf16 pages with mma.sync m16n8k16. A block of four warps works on up to 32 rows of
// products against one chunk of 256 keys after the other; a warp has 64 of the chunk's keys, four
// pages, to itself: it loads them, multiplies them with all rows and, once the rows' maxima are
// known, weighs their values. What the four warps found is then added in their order, so a chunk's
// sums are ((w0 + w1) + w2) + w3, each w a chain of mma steps of 16 keys, whatever the other rows.
//
// Two passes a chunk: scores and their maximum, then p = exp(score - max), of which l sums the
// unrounded values and PV takes bf16. Masked keys have p = +0, slots past the keys that some row of
// the item sees load as 0, and warps without such a key add nothing.
#include <algorithm>
#include <cmath>

#include "kernels/base/error.h"
#include "kernels/cuda/attention_rows.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * static_cast<int>(kWarp);
constexpr int kWarpKeys = kChunkKeys / kWarps;
constexpr int kWarpPages = kWarpKeys / kPageTokens;
constexpr int kRowTiles = kItemRows / 16;

// Shared memory of a block for heads of W elements, W a multiple of 16. Rows have 8 elements more,
// so that the eight rows which ldmatrix reads at once lie in different banks.
template <int W>
struct Layout {
  static constexpr int kStride = W + 8;
  static constexpr int kQueryBytes = kItemRows * kStride * 2;
  static constexpr int kWarpBytes = kWarpKeys * kStride * 2;  // keys or values of a warp
  static constexpr int kTileBytes = kWarps * kWarpBytes;
  static constexpr int kMaxOffset = kQueryBytes;
  static constexpr int kSumOffset = kMaxOffset + kWarps * kItemRows * 4;
  static constexpr int kStateOffset = kSumOffset + kWarps * kItemRows * 4;
  static constexpr int kRowOffset = kStateOffset + 2 * kItemRows * 8;
  static constexpr int kMergedOffset = kRowOffset + kItemRows * 16;
  static constexpr int kKeyOffset = kMergedOffset + kItemRows * W * 4;
  // Values have memory of their own where there is enough, else that of the keys.
  static constexpr int bytes(bool has_own_values) {
    return kKeyOffset + (has_own_values ? 2 : 1) * kTileBytes;
  }

  // Sums over a warp's values are made for kColumns of them at a time, as registers allow, and take
  // the place of those values: a row of sums is as long as the same columns of two keys.
  static constexpr int kColumns = W % 32 == 0 ? W / 2 : 16;
  static_assert(kItemRows * 4 == kWarpKeys * 2 && kColumns % 16 == 0);
  // Where the sum of a row and column lies, in bytes from the warp's values.
  ROLLPACK_HOST_DEVICE static constexpr int sum_offset(int row, int column) {
    const int part = column / kColumns, c = column % kColumns;
    const int key = 2 * row + c / (kColumns / 2);
    return (key * kStride + part * kColumns) * 2 + c % (kColumns / 2) * 4;
  }
};

// Elements of the item's sums that a thread merges: four neighbours at a time.
constexpr int kQuad = 4;
struct alignas(16) Quad {
  float at[kQuad];
};

// One item of the block, seen from one of its threads.
template <int W>
struct Block {
  using L = Layout<W>;

  const AttentionInputs& in;
  std::byte* shared;
  int warp, lane;
  AttentionItem item;
  HeadRange heads;
  KeyRange keys;  // that the item sees
  int row_tiles;  // of 16 rows that are in use
  uint16_t* warp_keys;
  uint16_t* warp_values;

  __device__ ItemRow* rows() const { return reinterpret_cast<ItemRow*>(shared + L::kRowOffset); }
  __device__ float* maxima() const { return reinterpret_cast<float*>(shared + L::kMaxOffset); }
  __device__ float* sums() const { return reinterpret_cast<float*>(shared + L::kSumOffset); }
  // Two sets, read and written by turns.
  __device__ SoftmaxState* states(int set) const {
    return reinterpret_cast<SoftmaxState*>(shared + L::kStateOffset) + set * kItemRows;
  }
  // The thread's j-th quad of the sums of all chunks so far; no other thread reads it.
  __device__ Quad* merged(int j) const {
    return reinterpret_cast<Quad*>(shared + L::kMergedOffset) + j * kThreads + threadIdx.x;
  }
  __device__ Quad partial(int of_warp, int row, int column) const {
    const std::byte* const values =
        reinterpret_cast<std::byte*>(warp_values) + (of_warp - warp) * L::kWarpBytes;
    return *reinterpret_cast<const Quad*>(values + L::sum_offset(row, column));
  }
  // Whether some key of a chunk that a warp has is seen.
  __device__ bool is_active(int of_warp, int32_t chunk) const {
    const int32_t first = chunk * kChunkKeys + of_warp * kWarpKeys;
    return keys.begin < first + kWarpKeys && keys.end > first;
  }

  __device__ void load_queries() const;
  __device__ void load_tile(int32_t chunk, bool is_value, uint16_t* target) const;
  __device__ void score(float (&s)[kRowTiles][8][4]) const;
  __device__ void mask(int32_t chunk, float scale, float (&s)[kRowTiles][8][4]) const;
  __device__ void soften(float (&s)[kRowTiles][8][4],
                         uint32_t (&p)[kRowTiles][kWarpPages][4]) const;
  __device__ void weigh(const uint32_t (&p)[kRowTiles][kWarpPages][4]) const;
};

// Queries [kItemRows][kStride]; rows and elements past theirs are 0.
template <int W>
__device__ void Block<W>::load_queries() const {
  const int K = in.cache.K;
  auto* const target = reinterpret_cast<uint16_t*>(shared);
  const auto* const q = static_cast<const uint16_t*>(in.q);
  for (int i = static_cast<int>(threadIdx.x); i < kItemRows * W; i += kThreads) {
    const int index = i / W, k = i % W;
    const ItemRow row = rows()[index];
    const bool is_valid = row.row >= 0 && k < K;
    target[index * L::kStride + k] =
        is_valid ? q[(static_cast<int64_t>(row.row) * in.H + row.head) * K + k] : uint16_t{0};
  }
}

// Starts to copy the warp's keys or values of a chunk, zeros where no row of the item sees them.
template <int W>
__device__ void Block<W>::load_tile(int32_t chunk, bool is_value, uint16_t* target) const {
  constexpr int kParts = W / 8;  // of 16 bytes
  const KeyRange seen = chunk_keys(keys, chunk);
  const int32_t first = chunk * kChunkKeys + warp * kWarpKeys;
  const int stride = in.cache.row_stride;
  ROLLPACK_UNROLL(4)
  for (int i = lane; i < kWarpKeys * kParts; i += static_cast<int>(kWarp)) {
    const int key = i / kParts, part = i % kParts;
    const int32_t position = first + key;
    const bool is_valid = position >= seen.begin && position < seen.end && part * 8 < stride;
    const uint16_t* source = nullptr;
    if (is_valid) {
      const int32_t page = in.rows.page_tables[item.page_table + position / kPageTokens];
      source = is_value ? in.cache.values<uint16_t>(in.layer, page, heads.kv_head)
                        : in.cache.keys<uint16_t>(in.layer, page, heads.kv_head);
      source += (position % kPageTokens) * stride + part * 8;
    } else {
      source = reinterpret_cast<const uint16_t*>(in.cache.data);
    }
    cp_async_16(target + key * L::kStride + part * 8, source, is_valid);
  }
  cp_async_commit();
}

// s[t][n] = accumulators of row tile t and keys 8 n .. 8 n + 7 of the warp.
template <int W>
__device__ void Block<W>::score(float (&s)[kRowTiles][8][4]) const {
  const auto* const q = reinterpret_cast<const uint16_t*>(shared);
  ROLLPACK_UNROLL_WHOLLY
  for (int t = 0; t < kRowTiles; ++t) {
    ROLLPACK_UNROLL_WHOLLY
    for (int n = 0; n < 8; ++n) {
      ROLLPACK_UNROLL_WHOLLY
      for (int i = 0; i < 4; ++i) s[t][n][i] = 0.0f;
    }
  }
  ROLLPACK_UNROLL(2)
  for (int k = 0; k < W; k += 16) {
    uint32_t a[kRowTiles][4];
    ROLLPACK_UNROLL_WHOLLY
    for (int t = 0; t < kRowTiles; ++t) {
      if (t < row_tiles) {
        ldmatrix_x4(a[t], q + (t * 16 + lane % 16) * L::kStride + k + lane / 16 * 8);
      }
    }
    ROLLPACK_UNROLL_WHOLLY
    for (int pair = 0; pair < 4; ++pair) {  // 16 keys
      // Matrices: keys 0-7 of k 0-7 and 8-15, then keys 8-15 of both.
      uint32_t r[4];
      const int key = pair * 16 + lane % 8 + lane / 16 * 8;
      ldmatrix_x4(r, warp_keys + key * L::kStride + k + (lane / 8 % 2) * 8);
      const uint32_t low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
      ROLLPACK_UNROLL_WHOLLY
      for (int t = 0; t < kRowTiles; ++t) {
        if (t < row_tiles) {
          mma_bf16_m16n8k16(s[t][2 * pair], a[t], low);
          mma_bf16_m16n8k16(s[t][2 * pair + 1], a[t], high);
        }
      }
    }
  }
}

// Scales scores, masks what a row does not see with -infinity and notes the rows' maxima.
template <int W>
__device__ void Block<W>::mask(int32_t chunk, float scale, float (&s)[kRowTiles][8][4]) const {
  const int32_t first = chunk * kChunkKeys + warp * kWarpKeys + lane % 4 * 2;
  ROLLPACK_UNROLL_WHOLLY
  for (int t = 0; t < kRowTiles; ++t) {
    if (t >= row_tiles) continue;
    ROLLPACK_UNROLL_WHOLLY
    for (int half = 0; half < 2; ++half) {
      const int index = t * 16 + half * 8 + lane / 4;
      const ItemRow row = rows()[index];
      float max = -infinity_f32();
      ROLLPACK_UNROLL_WHOLLY
      for (int n = 0; n < 8; ++n) {
        ROLLPACK_UNROLL_WHOLLY
        for (int i = 0; i < 2; ++i) {
          const int32_t position = first + n * 8 + i;
          float& x = s[t][n][half * 2 + i];
          x = position >= row.begin && position < row.end ? x * scale : -infinity_f32();
          max = fmaxf(max, x);
        }
      }
      max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 1));
      max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 2));
      if (lane % 4 == 0) maxima()[warp * kItemRows + index] = max;
    }
  }
}

__device__ __forceinline__ float max_of_warps(const float* maxima, int index) {
  float max = maxima[index];
  for (int w = 1; w < kWarps; ++w) max = fmaxf(max, maxima[w * kItemRows + index]);
  return max;
}

// Scores to weights, rounded as the A operand of the second product; notes the rows' sums.
template <int W>
__device__ void Block<W>::soften(float (&s)[kRowTiles][8][4],
                                 uint32_t (&p)[kRowTiles][kWarpPages][4]) const {
  ROLLPACK_UNROLL_WHOLLY
  for (int t = 0; t < kRowTiles; ++t) {
    if (t >= row_tiles) continue;
    ROLLPACK_UNROLL_WHOLLY
    for (int half = 0; half < 2; ++half) {
      const int index = t * 16 + half * 8 + lane / 4;
      const float max = max_of_warps(maxima(), index);
      const float shift = max == -infinity_f32() ? 0.0f : max;  // nothing is seen: exp(-infinity)
      float sum = 0;
      ROLLPACK_UNROLL_WHOLLY
      for (int n = 0; n < 8; ++n) {
        const float first = exp_f32(s[t][n][half * 2] - shift);
        const float second = exp_f32(s[t][n][half * 2 + 1] - shift);
        sum += first + second;
        p[t][n / 2][n % 2 * 2 + half] = bf16_pair(first, second);
      }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (lane % 4 == 0) sums()[warp * kItemRows + index] = sum;
    }
  }
}

// The warp's part of sum p v, left where its values were.
template <int W>
__device__ void Block<W>::weigh(const uint32_t (&p)[kRowTiles][kWarpPages][4]) const {
  ROLLPACK_UNROLL(1)
  for (int first = 0; first < W; first += L::kColumns) {
    float o[kRowTiles][L::kColumns / 8][4];
    ROLLPACK_UNROLL_WHOLLY
    for (int t = 0; t < kRowTiles; ++t) {
      ROLLPACK_UNROLL_WHOLLY
      for (int n = 0; n < L::kColumns / 8; ++n) {
        ROLLPACK_UNROLL_WHOLLY
        for (int i = 0; i < 4; ++i) o[t][n][i] = 0.0f;
      }
    }
    ROLLPACK_UNROLL_WHOLLY
    for (int page = 0; page < kWarpPages; ++page) {
      ROLLPACK_UNROLL_WHOLLY
      for (int n = 0; n < L::kColumns / 8; n += 2) {
        // Transposed: keys 0-7 and 8-15 of eight columns, then of the next eight.
        uint32_t r[4];
        const int key = page * kPageTokens + lane % 16;
        ldmatrix_x4_trans(r, warp_values + key * L::kStride + first + n * 8 + lane / 16 * 8);
        const uint32_t low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
        ROLLPACK_UNROLL_WHOLLY
        for (int t = 0; t < kRowTiles; ++t) {
          if (t < row_tiles) {
            mma_bf16_m16n8k16(o[t][n], p[t][page], low);
            mma_bf16_m16n8k16(o[t][n + 1], p[t][page], high);
          }
        }
      }
    }
    __syncwarp();  // all lanes have read these columns
    std::byte* const target = reinterpret_cast<std::byte*>(warp_values);
    ROLLPACK_UNROLL_WHOLLY
    for (int t = 0; t < kRowTiles; ++t) {
      if (t >= row_tiles) continue;
      ROLLPACK_UNROLL_WHOLLY
      for (int n = 0; n < L::kColumns / 8; ++n) {
        ROLLPACK_UNROLL_WHOLLY
        for (int half = 0; half < 2; ++half) {
          auto* const at = reinterpret_cast<float*>(
              target + L::sum_offset(t * 16 + half * 8 + lane / 4, first + n * 8 + lane % 4 * 2));
          at[0] = o[t][n][half * 2];
          at[1] = o[t][n][half * 2 + 1];
        }
      }
    }
  }
}

template <int W>
__global__ void __launch_bounds__(kThreads, 2)
    attention_chunks(AttentionInputs in, float scale, bool has_own_values) {
  using L = Layout<W>;
  constexpr int kQuads = kItemRows * W / kQuad / kThreads;
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  std::byte* const shared = dynamic_shared();
  std::byte* const own_keys = shared + L::kKeyOffset + warp * L::kWarpBytes;
  Block<W> block{
      .in = in,
      .shared = shared,
      .warp = warp,
      .lane = static_cast<int>(threadIdx.x % kWarp),
      .item = {},
      .heads = head_range(in, static_cast<int32_t>(blockIdx.y)),
      .keys = {},
      .row_tiles = 0,
      .warp_keys = reinterpret_cast<uint16_t*>(own_keys),
      .warp_values = reinterpret_cast<uint16_t*>(own_keys + (has_own_values ? L::kTileBytes : 0))};
  const ChunkStates stored = chunk_states(in);
  const int32_t num_items = in.rows.scalars->num_items;
  for (int32_t i = static_cast<int32_t>(blockIdx.x); i < num_items;
       i += static_cast<int32_t>(gridDim.x)) {
    block.item = in.work.items[i];
    const AttentionItem& item = block.item;
    block.keys = item_keys(in, item);
    block.row_tiles = (item.num_rows * block.heads.count + 15) / 16;
    __syncthreads();  // the item before is done
    if (threadIdx.x < kItemRows) {
      const auto index = static_cast<int32_t>(threadIdx.x);
      block.rows()[index] = item_row(in, item, block.heads, index);
      block.states(first_chunk(item, block.keys) % 2)[index] = {-infinity_f32(), 0.0f};
    }
    __syncthreads();
    block.load_queries();
    __syncthreads();
    for (int j = 0; j < kQuads; ++j) *block.merged(j) = {};
    const int32_t begin_chunk = first_chunk(item, block.keys);
    for (int32_t chunk = begin_chunk; chunk < item.end_chunk; ++chunk) {
      const bool is_active = block.is_active(warp, chunk);
      float s[kRowTiles][8][4];
      if (is_active) {
        block.load_tile(chunk, false, block.warp_keys);
        if (has_own_values) {
          block.load_tile(chunk, true, block.warp_values);
          cp_async_wait<1>();
        } else {
          cp_async_wait<0>();
        }
        __syncwarp();
        block.score(s);
        block.mask(chunk, scale, s);
        if (!has_own_values) {
          __syncwarp();  // all lanes have read the keys
          block.load_tile(chunk, true, block.warp_values);
        }
      } else {
        block.maxima()[warp * kItemRows + block.lane] = -infinity_f32();
        block.sums()[warp * kItemRows + block.lane] = 0.0f;
      }
      __syncthreads();  // maxima
      if (is_active) {
        uint32_t p[kRowTiles][kWarpPages][4];
        block.soften(s, p);
        cp_async_wait<0>();
        __syncwarp();
        block.weigh(p);
      }
      __syncthreads();  // sums
      ROLLPACK_UNROLL(1)
      for (int j = 0; j < kQuads; ++j) {
        const int quad = j * kThreads + static_cast<int>(threadIdx.x);
        const int index = quad / (W / kQuad), column = quad % (W / kQuad) * kQuad;
        if (index >= block.row_tiles * 16) continue;
        const ItemRow row = block.rows()[index];
        SoftmaxState state = block.states(chunk % 2)[index];
        const SoftmaxState found = {max_of_warps(block.maxima(), index),
                                    ((block.sums()[index] + block.sums()[kItemRows + index]) +
                                     block.sums()[2 * kItemRows + index]) +
                                        block.sums()[3 * kItemRows + index]};
        const bool is_seen = row.begin < (chunk + 1) * kChunkKeys && row.end > chunk * kChunkKeys;
        float sum[kQuad] = {};
        for (int w = 0; w < kWarps; ++w) {
          if (!block.is_active(w, chunk)) continue;
          const Quad part = block.partial(w, index, column);
          ROLLPACK_UNROLL_WHOLLY
          for (int c = 0; c < kQuad; ++c) sum[c] += part.at[c];
        }
        if (item.is_direct != 0) {
          if (is_seen) {
            const MergeWeights weights = merge_states(state, found);
            Quad o = *block.merged(j);
            ROLLPACK_UNROLL_WHOLLY
            for (int c = 0; c < kQuad; ++c) o.at[c] = merge_sums(o.at[c], sum[c], weights);
            *block.merged(j) = o;
          }
          if (column == 0) block.states((chunk + 1) % 2)[index] = state;
        } else if (is_seen && column < in.cache.row_stride) {
          const int64_t at = state_index(in, row, chunk);
          float* const target = stored.sums + at * in.cache.row_stride + column;
          ROLLPACK_UNROLL_WHOLLY
          for (int c = 0; c < kQuad; ++c) target[c] = sum[c];
          if (column == 0) stored.softmax[at] = found;
        }
      }
      __syncthreads();  // the next chunk's copies and maxima take their places
    }
    if (item.is_direct == 0) {
      merge_complete_rows<uint16_t>(in, item, block.heads,
                                    reinterpret_cast<int32_t*>(block.states(0)));
      continue;
    }
    const int K = in.cache.K;
    ROLLPACK_UNROLL(1)
    for (int j = 0; j < kQuads; ++j) {
      const int quad = j * kThreads + static_cast<int>(threadIdx.x);
      const int index = quad / (W / kQuad), column = quad % (W / kQuad) * kQuad;
      if (index >= block.row_tiles * 16) continue;
      const ItemRow row = block.rows()[index];
      if (row.row < 0) continue;
      const float sum = block.states(item.end_chunk % 2)[index].sum;
      const Quad o = *block.merged(j);
      uint16_t* const out = static_cast<uint16_t*>(in.out) + row.row * in.out_stride + row.head * K;
      ROLLPACK_UNROLL_WHOLLY
      for (int c = 0; c < kQuad; ++c) {
        if (column + c < K) out[column + c] = rounded_to_bf16(o.at[c] / sum);
      }
    }
  }
}

template <int W>
void launch_chunks(Stream stream, const AttentionInputs& in) {
  const bool has_own_values = 2 * Layout<W>::bytes(true) <= in.max_shared_bytes;
  const auto parts = static_cast<uint32_t>(head_parts(in.H / in.cache.G));
  launch(attention_chunks<W>,
         {.kernel = "attention_chunks",
          .grid = {.x = static_cast<uint32_t>(in.work.item_blocks),
                   .y = static_cast<uint32_t>(in.cache.G) * parts},
          .block = kThreads,
          .shared_bytes = Layout<W>::bytes(has_own_values)},
         stream, in, 1.0f / std::sqrt(static_cast<float>(in.cache.K)), has_own_values);
}

}  // namespace

void attention_bf16(Stream stream, const AttentionInputs& in) {
  const int32_t width = in.cache.row_stride;
  if (width <= 16) return launch_chunks<16>(stream, in);
  if (width <= 32) return launch_chunks<32>(stream, in);
  if (width <= 64) return launch_chunks<64>(stream, in);
  if (width <= 80) return launch_chunks<80>(stream, in);
  if (width <= 96) return launch_chunks<96>(stream, in);
  if (width <= kMaxHeadWidth) return launch_chunks<128>(stream, in);
  fail_invariant("attention: a head wider than the backend accepts");
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
