#include "kernels/cpu/gemm.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "kernels/cpu/panel_shares.h"

namespace rollpack::kernels::cpu {
namespace {

// A product is cut into items of one panel x up to chunk_rows() rows.
// Items a thread should find at least, so that waiting for the last one is
// short, and the fewest row tiles of an item: two halves of a tile cost two
// tiles.
constexpr int64_t kItemsPerThread = 4;
constexpr int64_t kMinTilesPerItem = 2;

template <class Element>
TileOutput tile_output(const GemmArgs& args, int64_t row, int64_t panel) {
  const int64_t per_panel = args.weight.columns_per_panel();
  const int64_t column = panel * per_panel;
  const int64_t offset = row * args.out_stride + column;
  TileOutput output{.stride = args.out_stride,
                    .columns = static_cast<int>(std::min(per_panel, args.weight.columns - column))};
  output.out = args.epilogue == Epilogue::kGated
                   ? static_cast<void*>(static_cast<Element*>(args.out) + offset)
                   : static_cast<void*>(static_cast<float*>(args.out) + offset);
  if (args.bias != nullptr) output.bias = args.bias + column;
  output.up_bias = args.weight.columns;
  return output;
}

// Asks for the lines that a tile is stored to before its product is computed: they were last in
// another core's cache, and a tile's rows lie too far apart for the hardware to fetch them ahead.
template <class Element>
void bring_in_output(const GemmArgs& args, const TileOutput& output, int rows) {
  const int64_t bytes =
      args.epilogue == Epilogue::kGated ? static_cast<int64_t>(sizeof(Element)) : int64_t{4};
  for (int r = 0; r < rows; ++r) {
    const std::byte* const row =
        static_cast<const std::byte*>(output.out) + r * output.stride * bytes;
    for (int64_t b = 0; b < output.columns * bytes; b += 64) __builtin_prefetch(row + b, 1, 3);
  }
}

// Chunks of rows to cut a product into: `wanted`, or some more where a thread's
// share of items would be fuller: 9 panels are 5 and 4 for two threads, a tenth
// of their time idle, 18 halves are 9 and
// 9. Threads that read the same panel at a time find it in the cache that they
// share.
int64_t balanced_chunks(int64_t wanted, int64_t most, int64_t num_panels, int64_t num_threads) {
  const auto idle_share = [&](int64_t chunks) {
    const int64_t items = chunks * num_panels;
    const int64_t idle = (num_threads - items % num_threads) % num_threads;
    return static_cast<double>(idle) / static_cast<double>(items + idle);
  };
  int64_t best = std::min(wanted, most);
  const int64_t end = std::min(most, 2 * best) + 1;
  for (int64_t chunks = best + 1; chunks < end; ++chunks) {
    // A half tile in each chunk costs about as much as this gains.
    if (idle_share(chunks) + 0.03 < idle_share(best)) best = chunks;
  }
  return best;
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
void gemm(const KernelTable& kernels, ThreadPool& pool, PanelProducts<Element>& products,
          const InputRows<Element>& in, const GemmArgs& args) {
  if (in.rows == 0 || args.weight.columns == 0) return;
  products.begin(pool, in);
  const ElementKernels<Element>& of = kernels.of<Element>();
  const auto store = args.epilogue == Epilogue::kGated      ? of.store_gated
                     : args.epilogue == Epilogue::kResidual ? kernels.store_residual
                                                            : kernels.store_plain;
  const PackedMatrix& weight = args.weight;
  const int64_t num_panels = weight.num_panels();
  const RowTiles& tiles = products.tiles();
  const int64_t wanted =
      std::max((in.rows + products.chunk_rows() - 1) / products.chunk_rows(),
               (pool.num_threads() * kItemsPerThread + num_panels - 1) / num_panels);
  const int64_t num_chunks = balanced_chunks(
      wanted, std::max<int64_t>(1, tiles.count / kMinTilesPerItem), num_panels, pool.num_threads());
  PanelShares shares(num_chunks * num_panels, pool.num_threads());
  shares.run(pool, [&](int64_t item, int64_t next, int thread) {
    const int64_t chunk = item / num_panels, panel = item % num_panels;
    TileOutput output;
    const auto rows_of = [&](int64_t tile) {
      return static_cast<int>(tiles.begin(tile + 1) - tiles.begin(tile));
    };
    products.multiply(
        thread,
        {.first_tile = tiles.count * chunk / num_chunks,
         .end_tile = tiles.count * (chunk + 1) / num_chunks,
         .panel = weight.panel<Element>(panel),
         .panel_number = panel,
         .steps = weight.steps(),
         .has_next = next == item + 1},
        [&](int64_t tile) {
          output = tile_output<Element>(args, tiles.begin(tile), panel);
          bring_in_output<Element>(args, output, rows_of(tile));
        },
        [&](int64_t tile, const float* sums) { store(sums, rows_of(tile), output); });
  });
}

template InputRows<uint16_t> whole_steps(const Tensor&, std::vector<uint16_t>&);
template InputRows<float> whole_steps(const Tensor&, std::vector<float>&);
template void gemm(const KernelTable&, ThreadPool&, PanelProducts<uint16_t>&,
                   const InputRows<uint16_t>&, const GemmArgs&);
template void gemm(const KernelTable&, ThreadPool&, PanelProducts<float>&, const InputRows<float>&,
                   const GemmArgs&);

}  // namespace rollpack::kernels::cpu
