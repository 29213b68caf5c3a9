// Tiles of rows times a block of a packed panel, as the drivers of products see them. Where a
// processor multiplies bf16 pairs slowly, products of many rows run on their operands widened to
// f32: a pair is two single FMAs, odd element first, which is what a pair's product is defined as
// (kernels/cpu/README.md), so no bit depends on it.
#pragma once

#include <cstdint>
#include <vector>

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

template <class Element>
class PanelProducts {
 public:
  // widens: pairs of more than one tile of rows are widened. Ignored for f32.
  PanelProducts(const KernelTable& kernels, int num_threads, bool widens);

  bool widens() const { return widens_; }
  // Starts a product of these rows, which stay in place until the next one.
  void begin(ThreadPool& pool, const InputRows<Element>& in);
  // Rows that stay in L2 beside a block of a panel; widened they are twice as long.
  int64_t chunk_rows() const { return is_wide_ ? kChunkRows / 2 : kChunkRows; }

  // Steps [first_step, first_step + steps) of a panel, which lie at `columns`, for a chunk of rows.
  struct Block {
    const Element* columns = nullptr;
    int64_t first_step = 0;
    int64_t steps = 0;
    int64_t chunk = 0;
    int64_t panel = 0;
  };
  // Makes `block` the one that multiply() of this thread takes.
  void take(int thread, const Block& block);
  // tile = rows [row, row + num_rows) x the thread's block; num_rows <= kTileRows. See
  // panel_product in kernel_table.h.
  void multiply(int thread, int64_t row, int num_rows, float* tile, const PanelPass& pass) const;

 private:
  static constexpr int64_t kChunkRows = 256;

  // One thread's memory.
  struct Workspace {
    Block block;
    int64_t chunk = -1, first_panel = -1;  // the chunk at hand, and the first panel it meets
    std::vector<float> columns;            // [2 steps][64], where widened
  };

  void bring_in(const Block& block, int64_t row, int64_t end_row) const;

  const KernelTable& kernels_;
  const ElementKernels<Element>& of_;
  const bool widens_;
  std::vector<Workspace> workspaces_;

  // Of the product at hand.
  InputRows<Element> in_;
  bool is_wide_ = false;
  std::vector<float> wide_rows_;  // [rows][stride]
};

extern template class PanelProducts<uint16_t>;
extern template class PanelProducts<float>;

}  // namespace rollpack::kernels::cpu
