#include "kernels/cpu/gemm.h"

#include <algorithm>
#include <cstring>

namespace rollpack::kernels::cpu {
namespace {

// Tasks a thread should find at least, so that the last one's end is no long wait.
constexpr int64_t kTasksPerThread = 8;
// Fewest row tiles of a task: each task streams its panel once, from L2 on for all but the first.
constexpr int64_t kMinTilesPerTask = 2;

template <class Element>
TileOutput tile_output(const GemmArgs& args, int64_t row, int64_t panel) {
  const int64_t per_panel = args.weight.columns_per_panel();
  const int64_t column = panel * per_panel;
  const int64_t offset = row * args.weight.columns + column;
  TileOutput output{.stride = args.weight.columns,
                    .columns = static_cast<int>(
                        std::min(per_panel, args.weight.columns - column))};
  output.out = args.epilogue == Epilogue::kGated
                   ? static_cast<void*>(static_cast<Element*>(args.out) + offset)
                   : static_cast<void*>(static_cast<float*>(args.out) + offset);
  if (args.bias != nullptr) output.bias = args.bias + column;
  output.up_bias = args.weight.columns;
  return output;
}

}  // namespace

template <class Element>
InputRows<Element> whole_steps(const Tensor& in, std::vector<Element>& scratch) {
  constexpr int64_t kWidth = sizeof(Element) == 2 ? 2 : 1;
  if (in.cols() % kWidth == 0) return {in.as<Element>(), in.cols(), in.rows()};
  const int64_t stride = in.cols() + 1;
  scratch.assign(static_cast<size_t>(in.rows() * stride), Element{});
  for (int64_t row = 0; row < in.rows(); ++row) {
    std::memcpy(scratch.data() + row * stride, in.as<Element>() + row * in.cols(),
                static_cast<size_t>(in.cols()) * sizeof(Element));
  }
  return {scratch.data(), stride, in.rows()};
}

template <class Element>
void gemm(const KernelTable& kernels, ThreadPool& pool, const InputRows<Element>& in,
          const GemmArgs& args) {
  const ElementKernels<Element>& of = kernels.of<Element>();
  const RowTiles tiles(in.rows);
  const int64_t num_panels = args.weight.num_panels();
  const int64_t wanted_blocks =
      (pool.num_threads() * kTasksPerThread + num_panels - 1) / num_panels;
  const int64_t num_blocks =
      std::clamp<int64_t>(wanted_blocks, 1, std::max<int64_t>(1, tiles.count / kMinTilesPerTask));
  const auto store = args.epilogue == Epilogue::kGated      ? of.store_gated
                     : args.epilogue == Epilogue::kResidual ? kernels.store_residual
                                                            : kernels.store_plain;
  pool.parallel_for(num_panels * num_blocks, [&](int64_t task, int) {
    const int64_t panel = task / num_blocks;
    const int64_t block = task % num_blocks;
    const int64_t end_tile = tiles.count * (block + 1) / num_blocks;
    alignas(64) float tile[kTileRows * kPanelColumns];
    for (int64_t t = tiles.count * block / num_blocks; t < end_tile; ++t) {
      const int64_t row = tiles.begin(t);
      const int rows = static_cast<int>(tiles.begin(t + 1) - row);
      of.panel_product(in.data + row * in.stride, in.stride, rows,
                       args.weight.panel<Element>(panel), args.weight.steps(), tile);
      store(tile, rows, tile_output<Element>(args, row, panel));
    }
  });
}

template InputRows<uint16_t> whole_steps(const Tensor&, std::vector<uint16_t>&);
template InputRows<float> whole_steps(const Tensor&, std::vector<float>&);
template void gemm(const KernelTable&, ThreadPool&, const InputRows<uint16_t>&, const GemmArgs&);
template void gemm(const KernelTable&, ThreadPool&, const InputRows<float>&, const GemmArgs&);

}  // namespace rollpack::kernels::cpu
