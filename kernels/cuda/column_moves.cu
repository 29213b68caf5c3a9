// A block a row and part; a thread copies as many bytes at a time as all addresses are aligned to.
#include "kernels/cuda/column_moves.h"

#include "kernels/cuda/launchers.h"
#include "kernels/cuda/simt.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {
namespace {

constexpr unsigned kThreads = 128;

struct alignas(16) Bytes16 {
  uint64_t halves[2];
};

template <class Unit>
__global__ void __launch_bounds__(kThreads) copy_columns(MoveColumnsInputs in) {
  const int64_t row = blockIdx.x, part = blockIdx.y;
  const int64_t width = (in.starts[part + 1] - in.starts[part]) / int64_t{sizeof(Unit)};
  const auto* const source =
      reinterpret_cast<const Unit*>(in.source + part * in.source_part + row * in.source_stride);
  auto* const target =
      reinterpret_cast<Unit*>(in.target + row * in.target_stride + in.starts[part]);
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) target[i] = source[i];
}

template <class Unit>
void launch_copy(Stream stream, const MoveColumnsInputs& in) {
  launch(
      copy_columns<Unit>,
      {.kernel = "move_columns",
       .grid = {.x = static_cast<uint32_t>(in.num_rows), .y = static_cast<uint32_t>(in.num_parts)},
       .block = kThreads},
      stream, in);
}

}  // namespace

void move_columns(Stream stream, const MoveColumnsInputs& in) {
  if (in.num_rows == 0 || in.starts[in.num_parts] == in.starts[0]) return;
  // The lowest bit of any of them is what all are multiples of.
  auto bits = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(in.source)) |
              static_cast<uint64_t>(reinterpret_cast<uintptr_t>(in.target)) |
              static_cast<uint64_t>(in.source_part | in.source_stride | in.target_stride);
  for (int32_t part = 0; part <= in.num_parts; ++part) {
    bits |= static_cast<uint64_t>(in.starts[part]);
  }
  if (bits % 16 == 0) return launch_copy<Bytes16>(stream, in);
  if (bits % 8 == 0) return launch_copy<uint64_t>(stream, in);
  if (bits % 4 == 0) return launch_copy<uint32_t>(stream, in);
  if (bits % 2 == 0) return launch_copy<uint16_t>(stream, in);
  launch_copy<uint8_t>(stream, in);
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
