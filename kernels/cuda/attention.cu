// Attention of a step: the items of its work list, then the rows whose chunks were stored one by
// one, merged in order, and zeros for pads.
#include "kernels/cuda/attention.h"

#include "kernels/cuda/attention_rows.h"
#include "kernels/cuda/launchers.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {
namespace {

// A thread an element of the row and head; the same arithmetic as where chunks are merged at once.
template <class Element>
__global__ void __launch_bounds__(kMaxHeadWidth) merge_chunks(AttentionInputs in) {
  const AttentionMerge merge = in.work.merges[blockIdx.x];
  if (merge.row < 0) return;
  const auto head = static_cast<int32_t>(blockIdx.y);
  const auto column = static_cast<int32_t>(threadIdx.x);
  if (column >= in.cache.K) return;
  Element* const out = static_cast<Element*>(in.out) +
                       (static_cast<int64_t>(merge.row) * in.H + head) * in.cache.K + column;
  if (merge.first_state == kNoState) {
    *out = Element{};
    return;
  }
  const ChunkStates stored = chunk_states(in);
  const int32_t end = in.rows.positions[merge.row] + 1;
  const int32_t begin = in.window > 0 && end > in.window ? end - in.window : 0;
  SoftmaxState state = {-infinity_f32(), 0.0f};
  float o = 0;
  for (int32_t chunk = begin / kChunkKeys; chunk < merge.num_chunks; ++chunk) {
    const int64_t at = static_cast<int64_t>(merge.first_state + chunk) * in.H + head;
    const MergeWeights weights = merge_states(state, stored.softmax[at]);
    o = merge_sums(o, stored.sums[at * in.cache.row_stride + column], weights);
  }
  store_rounded(o / state.sum, out);
}

}  // namespace

void attention(Stream stream, const AttentionInputs& in) {
  const bool is_bf16 = in.dtype == DType::kBF16;
  if (in.work.item_blocks > 0) {
    is_bf16 ? attention_bf16(stream, in) : attention_f32(stream, in);
  }
  if (in.work.num_merges == 0) return;
  const LaunchShape shape{
      .kernel = "merge_chunks",
      .grid = {.x = static_cast<uint32_t>(in.work.num_merges), .y = static_cast<uint32_t>(in.H)},
      .block = static_cast<uint32_t>((in.cache.K + 31) / 32 * 32)};
  launch(is_bf16 ? merge_chunks<uint16_t> : merge_chunks<float>, shape, stream, in);
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
