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
  // Where a register is narrower than a panel, the product unpacks a block for all its columns.
  if (kernels.isa != Isa::kAvx512 && kernels.isa != Isa::kAvx512Bf16) return false;
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
PanelProducts<Element>::PanelProducts(const KernelTable& kernels, int num_threads, bool widens)
    : kernels_(kernels),
      of_(pair_kernels(kernels, widens).of<Element>()),
      widens_(widens && sizeof(Element) == 2),
      workspaces_(static_cast<size_t>(num_threads)) {}

template <class Element>
void PanelProducts<Element>::begin(ThreadPool& pool, const InputRows<Element>& in) {
  in_ = in;
  for (Workspace& work : workspaces_) work.chunk = -1;
  // A lone tile reads a panel once and waits for it: widening would only add to that.
  is_wide_ = widens_ && in.rows > kTileRows;
  if constexpr (sizeof(Element) == 2) {
    if (!is_wide_) return;
    wide_rows_.resize(std::max(wide_rows_.size(), static_cast<size_t>(in.rows * in.stride)));
    pool.parallel_for((in.rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
      const int64_t begin = task * kRowsPerTask;
      const int64_t count = std::min(in.rows - begin, kRowsPerTask) * in.stride;
      kernels_.widen_pairs(in.data + begin * in.stride, count / 2,
                           wide_rows_.data() + begin * in.stride);
    });
  }
}

template <class Element>
void PanelProducts<Element>::take(int thread, const Block& block) {
  Workspace& work = workspaces_[static_cast<size_t>(thread)];
  work.block = block;
  if (work.chunk != block.chunk) {
    work.chunk = block.chunk;
    work.first_panel = block.panel;
  }
  if constexpr (sizeof(Element) == 2) {
    if (!is_wide_) return;
    const auto size = static_cast<size_t>(2 * block.steps * kPanelColumns);
    work.columns.resize(std::max(work.columns.size(), size));
    kernels_.widen_panel(block.columns, block.steps, work.columns.data());
  }
}

// Asks for what the block reads of rows [row, end_row). Another thread has made half of them, so a
// thread that meets them first would wait for one line after the other.
template <class Element>
void PanelProducts<Element>::bring_in(const Block& block, int64_t row, int64_t end_row) const {
  constexpr int64_t kWidth = sizeof(Element) == 2 ? 2 : 1;
  const int64_t element_bytes = is_wide_ ? 4 : static_cast<int64_t>(sizeof(Element));
  const auto* const rows = is_wide_ ? reinterpret_cast<const std::byte*>(wide_rows_.data())
                                    : reinterpret_cast<const std::byte*>(in_.data);
  for (; row < end_row; ++row) {
    const std::byte* const part =
        rows + (row * in_.stride + block.first_step * kWidth) * element_bytes;
    for (int64_t b = 0; b < block.steps * kWidth * element_bytes; b += 64) {
      __builtin_prefetch(part + b, 0, 2);
    }
  }
}

template <class Element>
void PanelProducts<Element>::multiply(int thread, int64_t row, int num_rows, float* tile,
                                      const PanelPass& pass) const {
  const Workspace& work = workspaces_[static_cast<size_t>(thread)];
  const Block& block = work.block;
  if (block.panel == work.first_panel) {
    bring_in(block, row + num_rows, std::min(row + num_rows + kTileRows, in_.rows));
  }
  if (is_wide_) {
    kernels_.f32.panel_product(wide_rows_.data() + row * in_.stride + 2 * block.first_step,
                               in_.stride, num_rows, work.columns.data(), 2 * block.steps, tile,
                               pass);
    return;
  }
  constexpr int64_t kWidth = sizeof(Element) == 2 ? 2 : 1;
  of_.panel_product(in_.data + row * in_.stride + block.first_step * kWidth, in_.stride, num_rows,
                    block.columns, block.steps, tile, pass);
}

template class PanelProducts<uint16_t>;
template class PanelProducts<float>;

}  // namespace rollpack::kernels::cpu
