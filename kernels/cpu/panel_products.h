// Tiles of rows times a block of a packed panel, as the drivers of products see them. Where a
// processor multiplies bf16 pairs slowly, products of many rows run on their operands widened to
// f32: a pair is two single FMAs, odd element first, which is what a pair's product is defined as
// (kernels/cpu/README.md), so no bit depends on it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/cpu/aligned_floats.h"
#include "kernels/cpu/amx.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/row_tiles.h"
#include "kernels/cpu/thread_pool.h"

namespace rollpack::kernels::cpu {

// Whether products of pairs are faster widened, on the processor of the calling thread; some 0.2
// ms.
bool widening_pays(const KernelTable& kernels);

// The kernels that multiply pairs as they are, where `widens` says that their instruction for pairs
// is slow: those with two FMAs a pair.
const KernelTable& pair_kernels(const KernelTable& kernels, bool widens);

// How pairs are multiplied.
enum class PairPath {
  kPairs,    // as they are
  kWidened,  // those of more than one tile of rows as f32; the same bits
  kAmx,      // by tiles of the processor's; bits of their own (amx.h)
};

template <class Element>
class PanelProducts {
 public:
  // path: ignored for f32.
  PanelProducts(const KernelTable& kernels, int num_threads, PairPath path);

  bool widens() const { return path_ == PairPath::kWidened; }
  // Starts a product of these rows, which stay in place until the next one.
  void begin(ThreadPool& pool, const InputRows<Element>& in);
  const RowTiles& tiles() const { return tiles_; }
  // Rows that stay in L2 beside a block of a panel; widened they are twice as long.
  int64_t chunk_rows() const { return is_wide_ ? kChunkRows / 2 : kChunkRows; }

  // Tiles of rows times a panel.
  struct Item {
    int64_t first_tile = 0, end_tile = 0;  // chunk_rows() rows and a tile at most
    const Element* panel = nullptr;
    int64_t panel_number = 0;
    int64_t steps = 0;
    bool has_next = false;  // the thread's next item has the panel that follows in memory
  };
  // The product of an item, block by block of k and tile by tile. Before the last block of a tile
  // prepare(tile) is called, and finish(tile, sums) after it: sums [rows of the tile][64].
  template <class Prepare, class Finish>
  void multiply(int thread, const Item& item, Prepare prepare, Finish finish) {
    Workspace& work = workspaces_[static_cast<size_t>(thread)];
    AmxTiles amx;
    const int64_t num_blocks = blocks_of(item);
    for (int64_t block = 0; block < num_blocks; ++block) {
      const bool is_last = block + 1 == num_blocks;
      take(work, item, cut_of(item, block, num_blocks), cut_of(item, block + 1, num_blocks));
      for (int64_t tile = item.first_tile; tile < item.end_tile; ++tile) {
        float* const sums = sums_of(thread, item, tile);
        if (is_last) prepare(tile);
        multiply_tile(work, item, tile, amx, sums);
        if (is_last) finish(tile, sums);
      }
    }
  }
  // One row, apart from the product at hand: sums [64]. Any thread.
  void multiply_row(const Element* row, const Element* panel, int64_t steps, float* sums) const;
  // Where those sums lie; the same for every panel. Tiles share a place if k is one block.
  float* sums_of(int thread, const Item& item, int64_t tile) const {
    const int64_t row =
        blocks_of(item) > 1 ? tiles_.begin(tile) - tiles_.begin(item.first_tile) : 0;
    return workspaces_[static_cast<size_t>(thread)].sums.data() + row * kPanelColumns;
  }

 private:
  static constexpr int64_t kChunkRows = 256;

  // Steps [first_step, end_step) of a panel.
  struct Block {
    const Element* columns = nullptr;
    int64_t first_step = 0, end_step = 0;
  };
  // One thread's memory.
  struct Workspace {
    Block block;
    int64_t first_tile = -1, first_panel = -1;  // the rows at hand, and the first panel they meet
    AlignedFloats columns;                      // [2 steps][64], where widened
    AlignedFloats sums;                         // [rows of an item][64]
  };

  int64_t blocks_of(const Item& item) const {
    return (item.steps + block_steps_ - 1) / block_steps_;
  }
  // The step where a block begins: blocks are of about the same size, and of whole slices.
  int64_t cut_of(const Item& item, int64_t block, int64_t num_blocks) const {
    const int64_t num_slices = (item.steps + slice_steps_ - 1) / slice_steps_;
    return std::min(item.steps, num_slices * block / num_blocks * slice_steps_);
  }
  void take(Workspace& work, const Item& item, int64_t first_step, int64_t end_step);
  void multiply_tile(const Workspace& work, const Item& item, int64_t tile, AmxTiles& amx,
                     float* sums) const;
  PanelPass pass_of(const Block& block, const Item& item, int64_t tile) const;
  const std::byte* row_part(int64_t row, int64_t step) const;
  void bring_in(const Block& block, int64_t tile) const;

  const KernelTable& kernels_;
  const ElementKernels<Element>& of_;
  const PairPath path_;
  const int64_t slice_steps_;  // that are summed as one
  std::vector<Workspace> workspaces_;

  // Of the product at hand.
  InputRows<Element> in_;
  RowTiles tiles_{0};
  bool is_wide_ = false;
  int64_t block_steps_ = 0;
  AlignedFloats wide_rows_;  // [rows][stride]
};

extern template class PanelProducts<uint16_t>;
extern template class PanelProducts<float>;

}  // namespace rollpack::kernels::cpu
