// Kernels whose rows are independent and small: one block a row.
#include "kernels/cuda/row_ops.h"

#include "kernels/cuda/launchers.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/reduce.h"
#include "kernels/cuda/simt.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {
namespace {

constexpr unsigned kRowThreads = 128;
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int64_t kHeadPairs = 4;  // of a lane: heads are at most 256 wide

// ---- before the rows
// -----------------------------------------------------------------------------

// One block a slot.
__global__ void fill_slots(Slots slots, const SlotFill* fills, const int32_t* stop_tokens) {
  const SlotFill& fill = fills[blockIdx.x];
  uint32_t* const stop_bits = slots.stop_bits + static_cast<int64_t>(fill.slot) * slots.stop_words;
  for (int32_t word = static_cast<int32_t>(threadIdx.x); word < slots.stop_words;
       word += static_cast<int32_t>(blockDim.x)) {
    stop_bits[word] = 0;
  }
  if (threadIdx.x == 0) slots.states[fill.slot] = fill.state;
  __syncthreads();
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < fill.state.num_stop_tokens;
       i += static_cast<int32_t>(blockDim.x)) {
    const int32_t token = stop_tokens[fill.stop_begin + i];
    atomicOr(stop_bits + token / 32, 1u << (token % 32));
  }
}

// Block (x, y) copies K (even x) or V (odd x) of head x / 2 in layer y. A copy may read what the
// one before it wrote: each thread keeps to its own bytes of a page and takes all copies in order.
__global__ void copy_pages(KvCache cache, int32_t element_bytes, const PageCopy* copies,
                           int32_t num_copies) {
  const int64_t token_bytes = static_cast<int64_t>(cache.row_stride) * element_bytes;
  const int64_t half_bytes = kPageTokens * token_bytes;
  const auto half_of = [&](int32_t page) {
    const int64_t block =
        ((blockIdx.y * cache.num_pages + page) * cache.G + blockIdx.x / 2) * 2 + blockIdx.x % 2;
    return cache.data + block * half_bytes;
  };
  for (int64_t at = static_cast<int64_t>(threadIdx.x) * 16; at < half_bytes;
       at += static_cast<int64_t>(blockDim.x) * 16) {
    for (int32_t c = 0; c < num_copies; ++c) {
      const PageCopy copy = copies[c];
      if (copy.source == copy.target || at >= copy.num_tokens * token_bytes) continue;
      // Rows are multiples of 16 bytes, so a piece belongs to one token.
      const auto* source = reinterpret_cast<const uint64_t*>(half_of(copy.source) + at);
      auto* target = reinterpret_cast<uint64_t*>(half_of(copy.target) + at);
      target[0] = source[0];
      target[1] = source[1];
    }
  }
}

// ---- rows
// ----------------------------------------------------------------------------------------

template <class Element>
__global__ void embed_rows(StepRows rows, Slots slots, const Element* weight, int64_t first_token,
                           int64_t num_tokens, int64_t row_stride, int64_t width, float* out) {
  const int64_t row = blockIdx.x;
  int32_t token = rows.input_ids[row];
  if (token == kSkippedRow) return;
  if (token == kPendingToken) {
    token = slots.states[rows.sequence_slot[rows.row_sequence[row]]].pending_token;
  }
  const int64_t at = token - first_token;
  const bool is_held = at >= 0 && at < num_tokens;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    out[row * width + i] = is_held ? value_of(weight[at * row_stride + i]) : 0.0f;
  }
}

template <class Element>
__global__ void norm_rows(const float* in, const float* weight, float epsilon, int64_t width,
                          Element* out) {
  auto* const scratch = reinterpret_cast<float*>(dynamic_shared());
  const float* const row = in + blockIdx.x * width;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) sum = fmaf(row[i], row[i], sum);
  sum = block_sum<kRowWarps>(sum, scratch);
  const float root = sqrtf(sum / static_cast<float>(width) + epsilon);
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    store_rounded(row[i] / root * weight[i], out + blockIdx.x * width + i);
  }
}

// One head, by one warp: norm if asked for, rotation, one rounding. Whether all of it is finite.
template <class Element>
__device__ bool transform_head(const float* in, const float* norm, float epsilon,
                               const float* angles, int32_t K, Element* out) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x % kWarp);
  const int32_t half = K / 2;
  float first[kHeadPairs], second[kHeadPairs];
  float sum = 0;
  for (int32_t i = 0; i < kHeadPairs; ++i) {
    const int32_t at = lane + i * static_cast<int32_t>(kWarp);
    first[i] = at < half ? in[at] : 0.0f;
    second[i] = at < half ? in[at + half] : 0.0f;
    sum = fmaf(first[i], first[i], sum);
    sum = fmaf(second[i], second[i], sum);
  }
  float root = 1.0f;
  if (norm != nullptr) root = sqrtf(warp_sum(sum) / static_cast<float>(K) + epsilon);
  bool is_all_finite = true;
  for (int32_t i = 0; i < kHeadPairs; ++i) {
    const int32_t at = lane + i * static_cast<int32_t>(kWarp);
    if (at >= half) continue;
    float a = first[i], b = second[i];
    if (norm != nullptr) {
      a = a / root * norm[at];
      b = b / root * norm[at + half];
    }
    const float cosine = angles[at], sine = angles[at + half];
    store_rounded(fmaf(a, cosine, -(b * sine)), out + at);
    store_rounded(fmaf(b, cosine, a * sine), out + at + half);
    is_all_finite =
        is_all_finite && is_finite(value_of(out[at])) && is_finite(value_of(out[at + half]));
  }
  return is_all_finite;
}

// One value head, by one warp: rounded. Whether all of it is finite.
template <class Element>
__device__ bool round_head(const float* in, int32_t K, Element* out) {
  bool is_all_finite = true;
  for (int32_t at = static_cast<int32_t>(threadIdx.x % kWarp); at < K;
       at += static_cast<int32_t>(kWarp)) {
    store_rounded(in[at], out + at);
    is_all_finite = is_all_finite && is_finite(value_of(out[at]));
  }
  return is_all_finite;
}

// Warps take heads in turn. K and V go to their page at once; where some number of the row turns
// out not to be finite, zeros follow: no one reads the page before the kernel's end.
template <class Element>
__global__ void rope_append_rows(RopeAppendInputs in) {
  auto* const has_failed = reinterpret_cast<unsigned*>(dynamic_shared());
  const int64_t row = blockIdx.x;
  const int32_t G = in.cache.G, K = in.cache.K, H = in.H;
  const int32_t warp = static_cast<int32_t>(threadIdx.x / kWarp);
  const int32_t lane = static_cast<int32_t>(threadIdx.x % kWarp);
  Element* const q = static_cast<Element*>(in.q) + row * H * K;
  const int32_t position = in.rows.positions[row];
  if (position == kPadPosition) {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < H * K;
         i += static_cast<int32_t>(blockDim.x)) {
      store_rounded(0.0f, q + i);
    }
    return;
  }
  if (threadIdx.x == 0) *has_failed = 0;
  __syncthreads();
  const float* const qkv = in.qkv + row * (H + 2 * G) * K;
  const float* const angles = in.rope_table + static_cast<int64_t>(position) * K;
  const int32_t sequence = in.rows.row_sequence[row];
  const int32_t page =
      in.rows.page_tables[in.rows.page_table_starts[sequence] + position / kPageTokens];
  const int64_t at = static_cast<int64_t>(position % kPageTokens) * in.cache.row_stride;
  for (int32_t head = warp; head < H + 2 * G; head += kRowWarps) {
    const float* const source = qkv + static_cast<int64_t>(head) * K;
    bool is_all_finite = true;
    if (head < H) {
      transform_head(source, in.q_norm, in.norm_epsilon, angles, K, q + head * K);
    } else if (head < H + G) {
      is_all_finite = transform_head(source, in.k_norm, in.norm_epsilon, angles, K,
                                     in.cache.keys<Element>(in.layer, page, head - H) + at);
    } else {
      is_all_finite =
          round_head(source, K, in.cache.values<Element>(in.layer, page, head - H - G) + at);
    }
    if (!is_all_finite) atomicOr(has_failed, 1u);
  }
  __syncthreads();
  if (*has_failed == 0) return;
  if (threadIdx.x == 0) in.rows.row_failed[row] = 1;
  for (int32_t head = warp; head < G; head += kRowWarps) {
    for (int32_t i = lane; i < K; i += static_cast<int32_t>(kWarp)) {
      store_rounded(0.0f, in.cache.keys<Element>(in.layer, page, head) + at + i);
      store_rounded(0.0f, in.cache.values<Element>(in.layer, page, head) + at + i);
    }
  }
}

__global__ void gather(const int32_t* rows, const float* in, int64_t width, float* out) {
  if (rows[blockIdx.x] < 0) return;
  const float* const source = in + rows[blockIdx.x] * width;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    out[blockIdx.x * width + i] = source[i];
  }
}

LaunchShape block_a_row(const char* kernel, int64_t num_rows, int64_t shared_bytes = 0) {
  return {.kernel = kernel,
          .grid = {static_cast<uint32_t>(num_rows)},
          .block = kRowThreads,
          .shared_bytes = shared_bytes};
}

}  // namespace

void begin_step(Stream stream, const BeginStepInputs& in) {
  if (in.num_fills > 0) {
    launch(fill_slots, block_a_row("fill_slots", in.num_fills), stream, in.slots, in.fills,
           in.stop_tokens);
  }
  if (in.num_copies > 0) {
    LaunchShape shape = block_a_row("copy_pages", 2 * in.cache.G);
    shape.grid.y = static_cast<uint32_t>(in.num_layers);
    launch(copy_pages, shape, stream, in.cache, in.element_bytes, in.copies, in.num_copies);
  }
}

void embed(Stream stream, const EmbedInputs& in) {
  if (in.rows.num_rows == 0) return;
  const LaunchShape shape = block_a_row("embed", in.rows.num_rows);
  const DeviceMatrix& weight = in.weight;
  if (in.dtype == DType::kBF16) {
    launch(embed_rows<uint16_t>, shape, stream, in.rows, in.slots,
           static_cast<const uint16_t*>(weight.data), in.first_token, weight.N, weight.row_stride,
           weight.K_in, in.out);
  } else {
    launch(embed_rows<float>, shape, stream, in.rows, in.slots,
           static_cast<const float*>(weight.data), in.first_token, weight.N, weight.row_stride,
           weight.K_in, in.out);
  }
}

void rms_norm(Stream stream, const RmsNormInputs& in) {
  if (in.num_rows == 0) return;
  const LaunchShape shape = block_a_row("rms_norm", in.num_rows, kRowWarps * 4);
  if (in.dtype == DType::kBF16) {
    launch(norm_rows<uint16_t>, shape, stream, in.in, in.weight, in.epsilon, in.width,
           static_cast<uint16_t*>(in.out));
  } else {
    launch(norm_rows<float>, shape, stream, in.in, in.weight, in.epsilon, in.width,
           static_cast<float*>(in.out));
  }
}

void rope_append(Stream stream, const RopeAppendInputs& in) {
  if (in.rows.num_rows == 0) return;
  const LaunchShape shape = block_a_row("rope_append", in.rows.num_rows, 16);
  if (in.dtype == DType::kBF16) {
    launch(rope_append_rows<uint16_t>, shape, stream, in);
  } else {
    launch(rope_append_rows<float>, shape, stream, in);
  }
}

void gather_rows(Stream stream, const GatherRowsInputs& in) {
  if (in.head.num_rows == 0) return;
  launch(gather, block_a_row("gather_rows", in.head.num_rows), stream, in.head.rows, in.in,
         in.width, in.out);
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
