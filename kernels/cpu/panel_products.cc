#include "kernels/cpu/panel_products.h"

#include <algorithm>
#include <chrono>
#include <limits>

#include "kernels/cpu/path_check.h"

namespace rollpack::kernels::cpu {
namespace {

// Operands of the comparison: 16 KiB of a panel, which L1 holds, twice as much widened.
constexpr int64_t kComparedSteps = 64;
constexpr int kComparedCalls = 8;  // of one look at the clock, some 10 us
constexpr int kLooks = 8;
// Widening takes time of its own, a sixth of a product's at two tiles of rows and less at more.
constexpr double kWorthwhile = 0.85;

// Rows of one task of widening.
constexpr int64_t kRowsPerTask = 8;

// k goes in blocks, whose sums wait in f32 in between.
//
// Pairs: 512 steps of a panel are 128 KiB, the same steps of 256 rows 512 KiB, the block that is
// prefetched meanwhile 128 KiB and the sums 64 KiB, which L2 holds (1 MiB and more). A block is
// read from memory once a chunk of rows and from L2 by every further tile: 256 bytes in the 12
// cycles of its 24 products, or 24 where those are slow.
constexpr int64_t kStepsInL2 = 512;
// f32: a widened block is written before it is read, and L2 takes 17 bytes a cycle of what is
// written where L1 takes 64 (Granite Rapids; either gives the 21 that are wanted). 128 steps are
// 32 KiB of the 48 KiB or 32 KiB of L1, beside which two tiles of rows, 6 KiB, pass through; taking
// the sums up again costs 48 loads and stores in 1,536 cycles.
constexpr int64_t kStepsInL1 = 128;

// AMX: 96 steps of a panel are 24 KiB, which L1 (48 KiB wherever there is AMX) holds beside a tile
// of rows, 6 KiB, its sums, 4 KiB, and what comes next of both.
constexpr int64_t kAmxSteps = 6 * kAmxSliceSteps;

// What a lone tile brings in of the next block: it reads its own as fast as memory gives it, so
// this only bridges the gap between two blocks, 4 KiB, which the hardware's prefetcher does not.
constexpr int64_t kBridgeLines = 64;
// A row's step takes 2 cycles (4 VDPBF16PS at two a cycle), and memory gives a core a line every 6
// to 11 cycles (24 to 40 GB/s at 4 GHz): more prefetches than that only queue up.
constexpr int64_t kCyclesPerRowStep = 2;
constexpr int64_t kCyclesPerLine = 8;

// What the product of a block of `steps` steps with tile `tile` of num_tiles brings into L2 of the
// block at `next`. The first tile of all is left alone: what is not there yet it streams itself.
PanelPass look_ahead(const std::byte* next, int64_t steps, int64_t tile, int64_t num_tiles,
                     int64_t most_lines) {
  const int64_t block_lines = steps * kPanelColumns * 4 / 64;
  if (num_tiles == 1) return {.ahead = next, .ahead_lines = std::min(block_lines, kBridgeLines)};
  const int64_t share = (block_lines + num_tiles - 1) / num_tiles;
  const int64_t lines = std::min(share, most_lines);
  const int64_t first = std::min(tile * lines, block_lines);
  return {.ahead = next + first * 64, .ahead_lines = std::min(lines, block_lines - first)};
}

// Whether a tile of rows takes all columns of a panel at once. Where it does not, its product
// unpacks and keeps a part of the panel for all columns by itself, and computes at half the speed.
bool has_wide_registers(Isa isa) {
  return isa == Isa::kAvx512 || isa == Isa::kAvx512Bf16;
}

template <class Element>
double seconds_of_product(const KernelTable& kernels, const std::vector<Element>& rows,
                          const std::vector<Element>& panel, int64_t steps) {
  const auto stride = static_cast<int64_t>(rows.size()) / kTileRows;
  alignas(64) float tile[kTileRows * kPanelColumns];
  double best = std::numeric_limits<double>::infinity();
  for (int look = 0; look < kLooks; ++look) {
    const auto start = std::chrono::steady_clock::now();
    for (int call = 0; call < kComparedCalls; ++call) {
      kernels.of<Element>().panel_product(rows.data(), stride, kTileRows, panel.data(), steps, tile,
                                          {});
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count());
  }
  return best;
}

}  // namespace

bool widening_pays(const KernelTable& kernels) {
  if (!has_wide_registers(kernels.isa)) return false;
  const std::vector<uint16_t> rows(kTileRows * kComparedSteps * 2),
      panel(static_cast<size_t>(kPanelColumns * kComparedSteps * 2));
  const std::vector<float> wide_rows(rows.size()), wide_panel(panel.size());
  return seconds_of_product(kernels, wide_rows, wide_panel, 2 * kComparedSteps) <
             kWorthwhile * seconds_of_product(kernels, rows, panel, kComparedSteps) &&
         agrees_with_scalar(pair_kernels(kernels, true));
}

const KernelTable& pair_kernels(const KernelTable& kernels, bool widens) {
  return widens && kernels.isa == Isa::kAvx512Bf16 ? kernel_table(Isa::kAvx512) : kernels;
}

template <class Element>
PanelProducts<Element>::PanelProducts(const KernelTable& kernels, int num_threads, PairPath path)
    : kernels_(kernels),
      of_(pair_kernels(kernels, path == PairPath::kWidened).of<Element>()),
      path_(sizeof(Element) == 2 ? path : PairPath::kPairs),
      slice_steps_(path_ == PairPath::kAmx ? kAmxSliceSteps : 1),
      workspaces_(static_cast<size_t>(num_threads)) {
  for (Workspace& work : workspaces_) {
    work.sums.reserve((kChunkRows + kAmxTileRows) * kPanelColumns);
  }
}

template <class Element>
void PanelProducts<Element>::begin(ThreadPool& pool, const InputRows<Element>& in) {
  in_ = in;
  tiles_ = RowTiles(in.rows, path_ == PairPath::kAmx ? kAmxTileRows : kTileRows);
  for (Workspace& work : workspaces_) work.first_tile = -1;
  // A lone tile reads a panel once and waits for it: neither widening nor blocks in L1 would help.
  is_wide_ = widens() && tiles_.count > 1;
  block_steps_ = kStepsInL2;
  if (path_ == PairPath::kAmx && tiles_.count > 1) block_steps_ = kAmxSteps;
  if (is_wide_) block_steps_ = kStepsInL1 / 2;
  if (sizeof(Element) == 4 && tiles_.count > 1 && has_wide_registers(kernels_.isa)) {
    block_steps_ = kStepsInL1;
  }
  if constexpr (sizeof(Element) == 2) {
    if (!is_wide_) return;
    wide_rows_.reserve(in.rows * in.stride);
    pool.parallel_for((in.rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
      const int64_t begin = task * kRowsPerTask;
      const int64_t count = std::min(in.rows - begin, kRowsPerTask) * in.stride;
      kernels_.widen_pairs(in.data + begin * in.stride, count / 2,
                           wide_rows_.data() + begin * in.stride);
    });
  }
}

template <class Element>
void PanelProducts<Element>::take(Workspace& work, const Item& item, int64_t first_step,
                                  int64_t end_step) {
  constexpr int64_t kWidth = sizeof(Element) == 2 ? 2 : 1;
  const Element* const columns = item.panel + first_step * kPanelColumns * kWidth;
  work.block = {.columns = columns, .first_step = first_step, .end_step = end_step};
  if (work.first_tile != item.first_tile) {
    work.first_tile = item.first_tile;
    work.first_panel = item.panel_number;
  }
  if constexpr (sizeof(Element) == 2) {
    if (!is_wide_) return;
    work.columns.reserve(2 * (end_step - first_step) * kPanelColumns);
    kernels_.widen_panel(columns, end_step - first_step, work.columns.data());
  }
}

// Where a row's elements from a step on lie, as they are multiplied.
template <class Element>
const std::byte* PanelProducts<Element>::row_part(int64_t row, int64_t step) const {
  constexpr int64_t kWidth = sizeof(Element) == 2 ? 2 : 1;
  const int64_t element = row * in_.stride + step * kWidth;
  return is_wide_ ? reinterpret_cast<const std::byte*>(wide_rows_.data() + element)
                  : reinterpret_cast<const std::byte*>(in_.data + element);
}

// Asks for what the block reads of a tile's rows. Another thread has made half of them, so a thread
// that meets them first would wait for one line after the other.
template <class Element>
void PanelProducts<Element>::bring_in(const Block& block, int64_t tile) const {
  for (int64_t row = tiles_.begin(tile); row < tiles_.begin(tile + 1); ++row) {
    const std::byte* const end = row_part(row, block.end_step);
    for (const std::byte* at = row_part(row, block.first_step); at < end; at += 64) {
      __builtin_prefetch(at, 0, 2);
    }
  }
}

template <class Element>
PanelPass PanelProducts<Element>::pass_of(const Block& block, const Item& item,
                                          int64_t tile) const {
  constexpr int64_t kWidth = sizeof(Element) == 2 ? 2 : 1;
  const int64_t steps = block.end_step - block.first_step;
  const bool is_last = block.end_step == item.steps;
  PanelPass pass;
  // Panels lie one after the other, and so do their blocks: the next is what follows.
  if (!is_last || item.has_next) {
    const auto* const next =
        reinterpret_cast<const std::byte*>(block.columns + steps * kPanelColumns * kWidth);
    // Tiles of AMX take less time than memory does, however many rows they have.
    const int64_t rows = tiles_.begin(tile + 1) - tiles_.begin(tile);
    const int64_t most_lines = path_ == PairPath::kAmx
                                   ? std::numeric_limits<int64_t>::max()
                                   : steps * rows * kCyclesPerRowStep / kCyclesPerLine;
    pass = look_ahead(next, steps, tile - item.first_tile, item.end_tile - item.first_tile,
                      most_lines);
  }
  pass.continues = block.first_step > 0;
  pass.streams = item.end_tile - item.first_tile == 1;
  if (block_steps_ < kStepsInL2) {
    pass.next_rows = tile + 1 < item.end_tile
                         ? row_part(tiles_.begin(tile + 1), block.first_step)
                         : row_part(tiles_.begin(item.first_tile), is_last ? 0 : block.end_step);
  }
  return pass;
}

template <class Element>
void PanelProducts<Element>::multiply_tile(const Workspace& work, const Item& item, int64_t tile,
                                           AmxTiles& amx, float* sums) const {
  const Block& block = work.block;
  if (item.panel_number == work.first_panel && tile + 1 < item.end_tile) bring_in(block, tile + 1);
  const int64_t row = tiles_.begin(tile), steps = block.end_step - block.first_step;
  const auto num_rows = static_cast<int>(tiles_.begin(tile + 1) - row);
  const std::byte* const rows = row_part(row, block.first_step);
  const PanelPass pass = pass_of(block, item, tile);
  if constexpr (sizeof(Element) == 2) {
    if (path_ == PairPath::kAmx) {
      return amx.panel_product(in_.data + row * in_.stride + 2 * block.first_step, in_.stride,
                               num_rows, block.columns, steps, sums, pass);
    }
  }
  if (is_wide_) {
    kernels_.f32.panel_product(reinterpret_cast<const float*>(rows), in_.stride, num_rows,
                               work.columns.data(), 2 * steps, sums, pass);
  } else {
    of_.panel_product(reinterpret_cast<const Element*>(rows), in_.stride, num_rows, block.columns,
                      steps, sums, pass);
  }
}

template <class Element>
void PanelProducts<Element>::multiply_row(const Element* row, const Element* panel, int64_t steps,
                                          float* sums) const {
  if constexpr (sizeof(Element) == 2) {
    if (path_ == PairPath::kAmx) {
      return AmxTiles().panel_product(row, 2 * steps, 1, panel, steps, sums, {});
    }
  }
  of_.panel_product(row, 2 * steps, 1, panel, steps, sums, {});
}

template class PanelProducts<uint16_t>;
template class PanelProducts<float>;

}  // namespace rollpack::kernels::cpu
