// out = in weight^T with weights on the M side of the tensor core's products and tokens on its N
// side: one instruction and one order of sums from one row to the largest prefill. A block computes
// kTileColumns output columns for kTokens rows, in tiles of kTileK through a ring of shared memory.
//
// The sum of an element never depends on kTokens, nor on whether one block adds up all slices of K
// or each has a block that stores its partial sum, and the last of them to come adds all: both
// start a slice at 0, go on with k ascending and add slices in their order.
#include "kernels/cuda/linear.h"

#include "kernels/cuda/arrivals.h"
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/simt.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {
namespace {

constexpr int kThreads = 128;
constexpr int kTileK = 64;           // bf16: rows of 128 bytes in shared memory
constexpr int kChunks = kTileK / 8;  // 16-byte pieces of such a row
constexpr int kStages = 4;
constexpr int kFloatTileK = 32;

// Where results go: `out` by the epilogue, where is_partial by way of partial sums
// [slice][token][row of the weight] and how many slices of a tile are there.
struct Target {
  Epilogue epilogue;
  bool is_gated;
  bool is_partial;
  int64_t N;  // columns
  int64_t out_stride;
  int64_t num_rows;
  int64_t weight_rows;  // rows of the packed weight
  const float* bias;
  void* out;
  float* partials;
  int32_t* arrivals;  // [tiles of tokens][tiles of columns]
};

__device__ __forceinline__ float silu(float x) {
  return x / (1.0f + exp_f32(-x));
}

// Row `row` of a plain weight, finished.
__device__ __forceinline__ void store_plain(const Target& target, int64_t token, int64_t row,
                                            float sum) {
  if (row >= target.N || token >= target.num_rows) return;
  float* const out = static_cast<float*>(target.out) + token * target.out_stride + row;
  if (target.bias != nullptr) sum += target.bias[row];
  *out = target.epilogue == Epilogue::kResidual ? *out + sum : sum;
}

// Column `column` of gate and of up, finished.
template <class Element>
__device__ __forceinline__ void store_gated(const Target& target, int64_t token, int64_t column,
                                            float gate, float up) {
  if (column >= target.N || token >= target.num_rows) return;
  if (target.bias != nullptr) {
    gate += target.bias[column];
    up += target.bias[target.N + column];
  }
  store_rounded(silu(gate) * up,
                static_cast<Element*>(target.out) + token * target.out_stride + column);
}

// Rows `row` and `row` + 8 of a group of 16 of the weight, which is a pair of gate and up where the
// weight is gated.
template <class Element>
__device__ __forceinline__ void store_pair(const Target& target, int64_t slice, int64_t token,
                                           int64_t row, float first, float second) {
  if (target.is_partial) {
    if (token >= target.num_rows) return;
    float* const partials =
        target.partials + (slice * target.num_rows + token) * target.weight_rows;
    if (row < target.weight_rows) partials[row] = first;
    if (row + 8 < target.weight_rows) partials[row + 8] = second;
  } else if (target.is_gated) {
    store_gated<Element>(target, token, row / 16 * 8 + row % 16, first, second);
  } else {
    store_plain(target, token, row, first);
    store_plain(target, token, row + 8, second);
  }
}

// Behind the stores of a slice's partial sums of a tile of `num_tokens` tokens: the block whose
// slice came last adds all slices in their order and finishes the tile. A thread takes a row of the
// weight, or a pair of gate and up, of one token after the other.
template <class Element>
__device__ __forceinline__ void finish_tile(const Target& target, int64_t num_slices,
                                            int num_tokens) {
  auto* const is_last = reinterpret_cast<int32_t*>(dynamic_shared());
  publish_stores();
  if (threadIdx.x == 0) {
    int32_t* const counter =
        target.arrivals + static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    *is_last = arrive(counter, 1, static_cast<int32_t>(num_slices)) ? 1 : 0;
  }
  __syncthreads();
  if (*is_last == 0) return;
  see_stores();
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTileColumns;
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * num_tokens;
  const int per_token = static_cast<int>(kTileColumns) / (target.is_gated ? 2 : 1);
  ROLLPACK_UNROLL(1)
  for (int i = static_cast<int>(threadIdx.x); i < num_tokens * per_token; i += kThreads) {
    const int64_t token = first_token + i / per_token;
    const int64_t local = i % per_token;
    const int64_t row = first_row + (target.is_gated ? gated_row(local, 0) : local);
    if (token >= target.num_rows || row >= target.weight_rows) continue;
    const auto sum_of = [&](int64_t of_row) {
      const float* const at = target.partials + token * target.weight_rows + of_row;
      float sum = at[0];
      for (int64_t slice = 1; slice < num_slices; ++slice) {
        sum += at[slice * target.num_rows * target.weight_rows];
      }
      return sum;
    };
    if (target.is_gated) {
      store_gated<Element>(target, token, first_row / 2 + local, sum_of(row), sum_of(row + 8));
    } else {
      store_plain(target, token, row, sum_of(row));
    }
  }
}

// ---- bf16
// ----------------------------------------------------------------------------------------

struct Operand {
  const uint16_t* data;
  int64_t rows;
  int64_t row_stride;  // elements
  int64_t width;       // k
};

// Tiles lie in shared memory as rows of kChunks pieces; piece c of row r is at place c ^ (r % 8),
// so that the eight rows that ldmatrix reads at once lie in different banks.
__device__ __forceinline__ int piece_at(int row, int chunk) {
  return (row * kChunks + (chunk ^ (row % 8))) * 8;
}

// Asks for rows [first_row, first_row + kRows) and k [first_k, first_k + kTileK) of an operand,
// zeros beyond its ends and from end_k on. Rows that are no multiple of 16 bytes are read element
// by element.
template <int kRows>
__device__ __forceinline__ void load_tile(const Operand& operand, bool is_aligned,
                                          int64_t first_row, int64_t first_k, int64_t end_k,
                                          uint16_t* tile) {
  if (end_k > operand.width) end_k = operand.width;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int64_t k = first_k + chunk * 8;
    const bool is_inside = first_row + row < operand.rows && k < end_k;
    const uint16_t* const source =
        operand.data + (is_inside ? (first_row + row) * operand.row_stride + k : 0);
    uint16_t* const target = tile + piece_at(row, chunk);
    if (is_aligned) {
      cp_async_16(target, source, is_inside);
    } else {
      ROLLPACK_UNROLL_WHOLLY
      for (int j = 0; j < 8; ++j) target[j] = is_inside && k + j < end_k ? source[j] : 0;
    }
  }
}

// Blocks of a multiprocessor: the ring leaves room in its shared memory for 3 of 64 tokens and 4 of
// 32 (sm_90), and this many have registers.
constexpr int blocks_at_once(int num_tokens) {
  return num_tokens == 64 ? 3 : 5;
}

// Block (x, y, z): columns from x * kTileColumns, rows from y * kTokens; slice z alone where the
// target is partial, else all slices.
template <int kTokens>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kTokens))
    multiply(Operand weight, Operand in, bool is_in_aligned, SliceRule slices, Target target) {
  constexpr int kStageElements = (static_cast<int>(kTileColumns) + kTokens) * kTileK;
  auto* const ring = reinterpret_cast<uint16_t*>(dynamic_shared());
  const int warp = static_cast<int>(threadIdx.x / kWarp),
            lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTileColumns;
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * kTokens;
  const int64_t first_slice = target.is_partial ? blockIdx.z : 0;
  const int64_t num_slices = target.is_partial ? 1 : slices.count;
  // Slices are whole steps of 16, not whole tiles: the last tile of each may be filled up with
  // zeros.
  const int tiles_a_slice = static_cast<int>((slices.length + kTileK - 1) / kTileK);
  const int64_t last_begin = (first_slice + num_slices - 1) * slices.length;
  const int64_t last_length =
      in.width - last_begin < slices.length ? in.width - last_begin : slices.length;
  const int num_tiles =
      static_cast<int>((num_slices - 1) * tiles_a_slice + (last_length + kTileK - 1) / kTileK);

  const auto load_stage = [&](int index) {
    uint16_t* const stage = ring + index % kStages * kStageElements;
    const int64_t slice = first_slice + index / tiles_a_slice;
    const int64_t k = slice * slices.length + static_cast<int64_t>(index % tiles_a_slice) * kTileK;
    const int64_t end_k = (slice + 1) * slices.length;
    load_tile<static_cast<int>(kTileColumns)>(weight, true, first_column, k, end_k, stage);
    load_tile<kTokens>(in, is_in_aligned, first_token, k, end_k, stage + kTileColumns * kTileK);
  };
  // A group a stage, empty at the end, so that counting them is enough.
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < num_tiles) load_stage(i);
    cp_async_commit();
  }

  float total[kTokens / 8][4], sum[kTokens / 8][4];
  ROLLPACK_UNROLL_WHOLLY
  for (int n = 0; n < kTokens / 8; ++n) {
    ROLLPACK_UNROLL_WHOLLY
    for (int i = 0; i < 4; ++i) sum[n][i] = 0;
  }
  for (int index = 0; index < num_tiles; ++index) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the tile is there for all, and all have left the stage that is filled next
    if (index + kStages - 1 < num_tiles) load_stage(index + kStages - 1);
    cp_async_commit();
    const uint16_t* const columns = ring + index % kStages * kStageElements;
    const uint16_t* const tokens = columns + kTileColumns * kTileK;
    const int left_of_slice = static_cast<int>(slices.length) - index % tiles_a_slice * kTileK;
    ROLLPACK_UNROLL_WHOLLY
    for (int k = 0; k < kTileK / 16; k += 2) {
      if (k * 16 >= left_of_slice) break;
      uint32_t a[2][4];
      ROLLPACK_UNROLL_WHOLLY
      for (int i = 0; i < 2; ++i) {
        ldmatrix_x4(a[i], columns + piece_at(warp * 16 + lane % 16, (k + i) * 2 + lane / 16));
      }
      ROLLPACK_UNROLL_WHOLLY
      for (int n = 0; n < kTokens / 8; ++n) {
        uint32_t b[4];  // both steps of k
        ldmatrix_x4(b, tokens + piece_at(n * 8 + lane % 8, k * 2 + lane / 8));
        const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
        mma_bf16_m16n8k16(sum[n], a[0], b0);
        mma_bf16_m16n8k16(sum[n], a[1], b1);
      }
    }
    const bool ends_slice = (index + 1) % tiles_a_slice == 0 || index + 1 == num_tiles;
    if (!ends_slice) continue;
    const bool is_first = index < tiles_a_slice;
    ROLLPACK_UNROLL_WHOLLY
    for (int n = 0; n < kTokens / 8; ++n) {
      ROLLPACK_UNROLL_WHOLLY
      for (int i = 0; i < 4; ++i) {
        total[n][i] = is_first ? sum[n][i] : total[n][i] + sum[n][i];
        sum[n][i] = 0;
      }
    }
  }

  const int64_t row = first_column + warp * 16 + lane / 4;
  ROLLPACK_UNROLL_WHOLLY
  for (int n = 0; n < kTokens / 8; ++n) {
    const int64_t token = first_token + n * 8 + lane % 4 * 2;
    store_pair<uint16_t>(target, first_slice, token, row, total[n][0], total[n][2]);
    store_pair<uint16_t>(target, first_slice, token + 1, row, total[n][1], total[n][3]);
  }
  if (target.is_partial) finish_tile<uint16_t>(target, slices.count, kTokens);
}

// ---- f32
// -----------------------------------------------------------------------------------------

// As multiply, with one fused multiply-add a k. Thread t: rows 16 (t / 8 % 4) + t % 8 and + 8 of
// the tile of the weight, tokens t / 32 * 4 .. + 3.
__global__ void __launch_bounds__(kThreads, 4)
    multiply_f32(const float* weight, int64_t weight_rows, int64_t row_stride, const float* in,
                 int64_t width, SliceRule slices, Target target) {
  auto* const columns =
      reinterpret_cast<float*>(dynamic_shared());  // [kTileColumns][kFloatTileK + 1]
  float* const tokens = columns + kTileColumns * (kFloatTileK + 1);  // [kFloatTokens][kFloatTileK]
  const int t = static_cast<int>(threadIdx.x);
  const int pair = t / 8 % 4 * 16 + t % 8, first_own = t / 32 * 4;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTileColumns;
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * kFloatTokens;
  const int64_t first_slice = target.is_partial ? blockIdx.z : 0;
  const int64_t end_slice = target.is_partial ? first_slice + 1 : slices.count;
  float total[4][2];
  for (int64_t slice = first_slice; slice < end_slice; ++slice) {
    float sum[4][2] = {};
    const int64_t slice_end = (slice + 1) * slices.length;
    const int64_t end_k = slice_end < width ? slice_end : width;
    for (int64_t k0 = slice * slices.length; k0 < end_k; k0 += kFloatTileK) {
      __syncthreads();  // all have read the tile before
      ROLLPACK_UNROLL(4)
      for (int i = t; i < kTileColumns * kFloatTileK; i += kThreads) {
        const int64_t row = first_column + i / kFloatTileK, k = k0 + i % kFloatTileK;
        columns[i / kFloatTileK * (kFloatTileK + 1) + i % kFloatTileK] =
            row < weight_rows && k < end_k ? weight[row * row_stride + k] : 0.0f;
      }
      for (int i = t; i < kFloatTokens * kFloatTileK; i += kThreads) {
        const int64_t token = first_token + i / kFloatTileK, k = k0 + i % kFloatTileK;
        tokens[i] = token < target.num_rows && k < end_k ? in[token * width + k] : 0.0f;
      }
      __syncthreads();
      const int64_t left = end_k - k0;
      const int num_k = left < kFloatTileK ? static_cast<int>(left) : kFloatTileK;
      ROLLPACK_UNROLL(4)
      for (int k = 0; k < num_k; ++k) {
        const float first = columns[pair * (kFloatTileK + 1) + k];
        const float second = columns[(pair + 8) * (kFloatTileK + 1) + k];
        ROLLPACK_UNROLL_WHOLLY
        for (int i = 0; i < 4; ++i) {
          const float x = tokens[(first_own + i) * kFloatTileK + k];
          sum[i][0] = fmaf(first, x, sum[i][0]);
          sum[i][1] = fmaf(second, x, sum[i][1]);
        }
      }
    }
    ROLLPACK_UNROLL_WHOLLY
    for (int i = 0; i < 4; ++i) {
      ROLLPACK_UNROLL_WHOLLY
      for (int j = 0; j < 2; ++j) {
        total[i][j] = slice == first_slice ? sum[i][j] : total[i][j] + sum[i][j];
      }
    }
  }
  ROLLPACK_UNROLL_WHOLLY
  for (int i = 0; i < 4; ++i) {
    store_pair<float>(target, first_slice, first_token + first_own + i, first_column + pair,
                      total[i][0], total[i][1]);
  }
  if (target.is_partial) finish_tile<float>(target, slices.count, kFloatTokens);
}

// ---- launches
// ------------------------------------------------------------------------------------

template <int kTokens>
void launch_multiply(Stream stream, const LinearInputs& in, const Target& target, GridShape grid) {
  const Operand weight{static_cast<const uint16_t*>(in.weight.data), target.weight_rows,
                       in.weight.row_stride, in.weight.row_stride};
  const Operand rows{static_cast<const uint16_t*>(in.in), in.num_rows, in.weight.K_in,
                     in.weight.K_in};
  const bool is_aligned = in.weight.K_in % 8 == 0 && reinterpret_cast<uintptr_t>(in.in) % 16 == 0;
  constexpr int64_t kBytes = int64_t{kStages} * (kTileColumns + kTokens) * kTileK * 2;
  launch(multiply<kTokens>,
         {.kernel = "linear", .grid = grid, .block = kThreads, .shared_bytes = kBytes}, stream,
         weight, rows, is_aligned, in.slices, target);
}

}  // namespace

void linear(Stream stream, const LinearInputs& in) {
  if (in.num_rows == 0 || in.weight.N == 0) return;
  Target target{.epilogue = in.epilogue,
                .is_gated = in.weight.is_gated,
                .is_partial = false,
                .N = in.weight.N,
                .out_stride = in.out_stride,
                .num_rows = in.num_rows,
                .weight_rows = packed_rows(in.weight),
                .bias = in.bias,
                .out = in.out,
                .partials = static_cast<float*>(in.workspace),
                .arrivals = reinterpret_cast<int32_t*>(static_cast<std::byte*>(in.workspace) +
                                                       kPartialsBytes)};
  const bool is_bf16 = in.dtype == DType::kBF16;
  const int64_t tokens = tokens_per_tile(in.dtype, in.num_rows);
  GridShape grid{.x = static_cast<uint32_t>(tiles_of(target.weight_rows, kTileColumns)),
                 .y = static_cast<uint32_t>(tiles_of(in.num_rows, tokens))};
  target.is_partial = writes_partials(in.dtype, in.slices, target.weight_rows, in.num_rows);
  if (target.is_partial) grid.z = static_cast<uint32_t>(in.slices.count);
  if (!is_bf16) {
    constexpr int64_t kBytes =
        (kTileColumns * (kFloatTileK + 1) + kFloatTokens * kFloatTileK) * int64_t{4};
    launch(multiply_f32,
           {.kernel = "linear_f32", .grid = grid, .block = kThreads, .shared_bytes = kBytes},
           stream, static_cast<const float*>(in.weight.data), target.weight_rows,
           in.weight.row_stride, static_cast<const float*>(in.in), in.weight.K_in, in.slices,
           target);
  } else if (tokens == 8) {
    launch_multiply<8>(stream, in, target, grid);
  } else if (tokens == 32) {
    launch_multiply<32>(stream, in, target, grid);
  } else {
    launch_multiply<64>(stream, in, target, grid);
  }
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
