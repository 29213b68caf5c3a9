// Attention of a step: the items of its work list, and zeros for pads.
#include "kernels/cuda/attention.h"

#include "kernels/cuda/attention_rows.h"
#include "kernels/cuda/launchers.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {
namespace {

constexpr unsigned kPadThreads = 128;

// A block a pad.
template <class Element>
__global__ void clear_pads(const int32_t* pad_rows, int64_t width, int64_t stride, Element* out) {
  Element* const row = out + pad_rows[blockIdx.x] * stride;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) row[i] = Element{};
}

template <class Element>
void launch_clear_pads(Stream stream, const AttentionInputs& in) {
  launch(clear_pads<Element>,
         {.kernel = "clear_pads",
          .grid = {static_cast<uint32_t>(in.work.num_pads)},
          .block = kPadThreads},
         stream, in.work.pad_rows, int64_t{in.H} * in.cache.K, in.out_stride,
         static_cast<Element*>(in.out));
}

}  // namespace

void attention(Stream stream, const AttentionInputs& in) {
  const bool is_bf16 = in.dtype == DType::kBF16;
  if (in.work.item_blocks > 0) {
    is_bf16 ? attention_bf16(stream, in) : attention_f32(stream, in);
  }
  if (in.work.num_pads > 0) {
    is_bf16 ? launch_clear_pads<uint16_t>(stream, in) : launch_clear_pads<float>(stream, in);
  }
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
