#include "kernels/cpu/vocab_stats.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <utility>

#include "kernels/cpu/panel_shares.h"

namespace rollpack::kernels::cpu {
namespace {

// x of a token that has been taken out.
constexpr float kNoMass = -std::numeric_limits<float>::infinity();

}  // namespace

template <class Element>
VocabStats<Element>::VocabStats(const KernelTable& kernels, PanelProducts<Element>& products,
                                int num_threads)
    : kernels_(kernels),
      products_(products),
      workspaces_(static_cast<size_t>(num_threads)),
      candidates_(kernels, num_threads) {
  for (int thread = 0; thread < num_threads; ++thread) {
    workspaces_[static_cast<size_t>(thread)].thread = thread;
  }
}

template <class Element>
void VocabStats<Element>::begin(const PackedMatrix& weight, const VocabularyPart& part,
                                const InputRows<Element>& in,
                                std::vector<Distribution> distributions, bool with_entropy) {
  weight_ = weight;
  in_ = in;
  with_entropy_ = with_entropy;
  V_ = part.V;
  num_blocks_ = (part.V + kBlockColumns - 1) / kBlockColumns;
  first_block_ = part.first_block;
  num_held_blocks_ = (weight.columns + kBlockColumns - 1) / kBlockColumns;
  distributions_ = std::move(distributions);
  first_distribution_.assign(static_cast<size_t>(in.rows) + 1, 0);
  candidate_counts_.clear();
  int64_t num_kept = 0;
  for (const Distribution& distribution : distributions_) {
    candidate_counts_.push_back(distribution.num_candidates);
    ++first_distribution_[static_cast<size_t>(distribution.head_row) + 1];
    if (distribution.first_block >= 0) num_kept += num_held_blocks_;
  }
  for (size_t row = 1; row < first_distribution_.size(); ++row) {
    first_distribution_[row] += first_distribution_[row - 1];
  }
  candidates_.begin(candidate_counts_);
  const size_t num_sums = distributions_.size() * static_cast<size_t>(num_blocks_);
  panels_.resize(static_cast<size_t>(num_kept));
  block_max_.resize(num_sums);
  block_sum_.resize(num_sums);
  block_weighted_.resize(num_sums);
  row_not_finite_.assign(static_cast<size_t>(in.rows), 0);
}

template <class Element>
void VocabStats<Element>::gather(std::span<const int32_t> head_rows) {
  const auto num_rows = static_cast<int64_t>(head_rows.size());
  if (num_rows == in_.rows) {
    group_ = in_;
    return;
  }
  gathered_.resize(static_cast<size_t>(num_rows * in_.stride));
  for (int64_t row = 0; row < num_rows; ++row) {
    std::copy_n(in_.data + head_rows[static_cast<size_t>(row)] * in_.stride, in_.stride,
                gathered_.data() + row * in_.stride);
  }
  group_ = {gathered_.data(), in_.stride, num_rows};
}

template <class Element>
void VocabStats<Element>::compute(ThreadPool& pool, std::span<const int32_t> head_rows,
                                  float* logits) {
  if (head_rows.empty() || num_held_blocks_ == 0) return;
  gather(head_rows);
  products_.begin(pool, group_);
  // A chunk's activations (512 KiB of bf16 at D = 1024) stay in L2 beside the panel at hand and the
  // next one, and a panel is read from memory once a chunk.
  const int64_t num_chunks = (group_.rows + products_.chunk_rows() - 1) / products_.chunk_rows();
  PanelShares shares(num_chunks * num_held_blocks_, pool.num_threads());
  shares.run(pool, [&](int64_t item, int64_t next, int thread) {
    const int64_t chunk = item / num_held_blocks_, num_tiles = products_.tiles().count;
    compute_block(head_rows,
                  {.first_tile = num_tiles * chunk / num_chunks,
                   .end_tile = num_tiles * (chunk + 1) / num_chunks,
                   .steps = weight_.steps(),
                   .has_next = next >= 0},
                  item % num_held_blocks_, logits, workspaces_[static_cast<size_t>(thread)]);
  });
}

template <class Element>
void VocabStats<Element>::share(Communicator& communicator, std::span<const int64_t> block_starts) {
  communicator.all_reduce<Reduction::kMax>(std::span(row_not_finite_));
  const auto share_columns = [&](auto& values) {
    constexpr auto kBytes = static_cast<int64_t>(sizeof(values[0]));
    std::vector<int64_t> starts;
    for (const int64_t start : block_starts) starts.push_back(start * kBytes);
    communicator.gather_columns({.in = values.data() + first_block_,
                                 .in_stride = num_blocks_ * kBytes,
                                 .out = values.data(),
                                 .out_stride = num_blocks_ * kBytes,
                                 .rows = static_cast<int64_t>(distributions_.size()),
                                 .starts = starts});
  };
  share_columns(block_max_);
  share_columns(block_sum_);
  if (with_entropy_) share_columns(block_weighted_);
}

template <class Element>
int VocabStats<Element>::panel_columns(int64_t held_panel) const {
  return static_cast<int>(
      std::clamp<int64_t>(weight_.columns - held_panel * kPanelColumns, 0, kPanelColumns));
}

// The item's tiles of the call's rows against the 16 panels of a block, which is counted among
// those held here; so are its panels.
template <class Element>
void VocabStats<Element>::compute_block(std::span<const int32_t> head_rows, Item item,
                                        int64_t block, float* logits, Workspace& work) {
  const RowTiles& tiles = products_.tiles();
  const int64_t first = tiles.begin(item.first_tile), last = tiles.begin(item.end_tile);
  // A call's rows may have gaps, and so have their distributions: room for the whole span.
  const int64_t first_index = first_distribution(head_rows[static_cast<size_t>(first)]);
  const int64_t end_index = first_distribution(head_rows[static_cast<size_t>(last - 1)] + 1);
  work.panels.resize(std::max(work.panels.size(), static_cast<size_t>(end_index - first_index)));
  const int64_t first_panel = block * kBlockPanels;
  const int64_t end_panel = std::min(first_panel + kBlockPanels, weight_.num_panels());
  if (end_panel < first_panel + kBlockPanels) {
    std::fill_n(work.panels.begin(), end_index - first_index, BlockPanels::empty());
  }
  list_rows(head_rows, item, first_index, work);
  const bool has_next_block = item.has_next;
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    item.panel = weight_.panel<Element>(panel);
    item.panel_number = panel;
    item.has_next = panel + 1 < end_panel || has_next_block;
    products_.multiply(
        work.thread, item, [](int64_t) {},
        [&](int64_t tile, const float* sums) {
          const int64_t row = tiles.begin(tile);
          const auto rows = static_cast<size_t>(tiles.begin(tile + 1) - row);
          reduce_tile(head_rows.subspan(static_cast<size_t>(row), rows), sums, panel,
                      work.tiles[static_cast<size_t>(tile - item.first_tile)], work);
          if (logits != nullptr) keep_logits(sums, row, rows, panel, logits);
        });
  }
  for (int64_t row = first; row < last; ++row) {
    const int32_t head_row = head_rows[static_cast<size_t>(row)];
    for (int32_t d = first_distribution(head_row); d < first_distribution(head_row + 1); ++d) {
      finish_block(d, block, work.panels[static_cast<size_t>(d - first_index)]);
    }
  }
}

template <class Element>
void VocabStats<Element>::keep_logits(const float* sums, int64_t row, size_t num_rows,
                                      int64_t panel, float* logits) const {
  for (size_t r = 0; r < num_rows; ++r) {
    float* const kept =
        logits + (row + static_cast<int64_t>(r)) * logits_stride() + panel * kPanelColumns;
    std::copy_n(sums + r * kPanelColumns, kPanelColumns, kept);
    // Rows are far apart, so nothing else brings in what the next panel's stores need.
    for (int c = 0; c < kPanelColumns; c += 16) {
      __builtin_prefetch(kept + kPanelColumns + c, 1, 3);
    }
  }
}

// What to reduce of each tile of a chunk; the same for every panel of a block.
template <class Element>
void VocabStats<Element>::list_rows(std::span<const int32_t> head_rows, const Item& item,
                                    int64_t first_index, Workspace& work) const {
  const RowTiles& tiles = products_.tiles();
  work.rows.clear();
  work.collecting.clear();
  work.tiles.clear();
  for (int64_t t = item.first_tile; t < item.end_tile; ++t) {
    const float* const sums = products_.sums_of(work.thread, item, t);
    TileRows listed{.first_row = work.rows.size(), .first_collecting = work.collecting.size()};
    for (int64_t row = tiles.begin(t); row < tiles.begin(t + 1); ++row) {
      const int32_t head_row = head_rows[static_cast<size_t>(row)];
      for (int32_t d = first_distribution(head_row); d < first_distribution(head_row + 1); ++d) {
        const Distribution& distribution = distributions_[static_cast<size_t>(d)];
        if (distribution.num_candidates > 0) {
          work.collecting.push_back({.row = static_cast<int32_t>(work.rows.size()), .index = d});
        }
        work.rows.push_back({.logits = sums + (row - tiles.begin(t)) * kPanelColumns,
                             .scale = distribution.scale,
                             .block = &work.panels[static_cast<size_t>(d - first_index)]});
      }
    }
    listed.end_row = work.rows.size();
    listed.end_collecting = work.collecting.size();
    work.tiles.push_back(listed);
  }
}

template <class Element>
void VocabStats<Element>::reduce_tile(std::span<const int32_t> tile_rows, const float* tile,
                                      int64_t panel, const TileRows& listed, Workspace& work) {
  const int columns = panel_columns(panel);
  // The rows of a tile follow each other: one look at all of them, if all columns are in use.
  const bool is_whole = columns == kPanelColumns;
  const bool is_finite =
      is_whole && kernels_.all_finite(tile, static_cast<int64_t>(tile_rows.size()) * columns);
  for (size_t r = 0; !is_finite && r < tile_rows.size(); ++r) {
    if (kernels_.all_finite(tile + r * kPanelColumns, columns)) continue;
    // Relaxed: several threads store the same value, read after the loop's end.
    std::atomic_ref<uint8_t>(row_not_finite_[static_cast<size_t>(tile_rows[r])])
        .store(1, std::memory_order_relaxed);
  }
  const auto lane = static_cast<int>(panel % kBlockPanels);
  kernels_.panel_stats(work.rows.data() + listed.first_row,
                       static_cast<int>(listed.end_row - listed.first_row), columns, lane,
                       with_entropy_);
  for (size_t i = listed.first_collecting; i < listed.end_collecting; ++i) {
    const Collecting& at = work.collecting[i];
    const LogitsRow& row = work.rows[static_cast<size_t>(at.row)];
    if (!candidates_.may_hold(at.index, row.block->max[lane])) continue;
    candidates_.add(work.thread, at.index, row.logits, columns, row.scale,
                    static_cast<int32_t>((first_block_ * kBlockPanels + panel) * kPanelColumns));
  }
}

template <class Element>
void VocabStats<Element>::finish_block(int32_t distribution, int64_t block,
                                       const BlockPanels& panels) {
  const BlockStats stats = kernels_.merge_panels(panels, with_entropy_);
  const auto index = static_cast<size_t>(distribution * num_blocks_ + first_block_ + block);
  block_max_[index] = stats.max;
  block_sum_[index] = stats.sum;
  block_weighted_[index] = stats.weighted;
  const int64_t kept = distributions_[static_cast<size_t>(distribution)].first_block;
  if (kept >= 0) panels_[static_cast<size_t>(kept + block)] = panels;
}

template <class Element>
float VocabStats<Element>::max_of(int32_t distribution) const {
  const float* const first = block_max_.data() + distribution * num_blocks_;
  return *std::max_element(first, first + num_blocks_);
}

template <class Element>
RowStats VocabStats<Element>::merge(int32_t distribution, std::span<float> factors) const {
  const auto at = static_cast<size_t>(distribution * num_blocks_);
  const auto count = static_cast<size_t>(num_blocks_);
  const std::span<const float> maxes(block_max_.data() + at, count);
  RowStats row{.max = *std::ranges::max_element(maxes)};
  kernels_.shifted_exp(maxes.data(), num_blocks_, 1.0f, row.max, factors.data());
  row.add_blocks(maxes, {block_sum_.data() + at, count}, {block_weighted_.data() + at, count},
                 factors);
  return row;
}

template <class Element>
const BlockPanels& VocabStats<Element>::kept_panels(int32_t distribution, int64_t block,
                                                    const Exclusion* left) const {
  if (left != nullptr) {
    for (const Exclusion::Changed& changed : left->changed) {
      if (changed.block == block) return changed.panels;
    }
  }
  return panels_[static_cast<size_t>(distributions_[static_cast<size_t>(distribution)].first_block +
                                     block - first_block_)];
}

template <class Element>
void VocabStats<Element>::panel_logits(int32_t head_row, int64_t panel, float* logits) const {
  products_.multiply_row(in_.data + head_row * in_.stride,
                         weight_.panel<Element>(panel - first_block_ * kBlockPanels),
                         weight_.steps(), logits);
}

// -infinity for tokens that are taken out.
template <class Element>
void VocabStats<Element>::panel_logits_left(int32_t distribution, int64_t panel,
                                            const Exclusion* left, float* logits) const {
  panel_logits(distributions_[static_cast<size_t>(distribution)].head_row, panel, logits);
  if (left == nullptr) return;
  const int64_t first = panel * kPanelColumns;
  auto id = std::lower_bound(left->ids.begin(), left->ids.end(), first);
  for (; id != left->ids.end() && *id < first + kPanelColumns; ++id) logits[*id - first] = kNoMass;
}

template <class Element>
float VocabStats<Element>::logit(int32_t head_row, int32_t token) const {
  alignas(64) float logits[kPanelColumns];
  panel_logits(head_row, token / kPanelColumns, logits);
  return logits[token % kPanelColumns];
}

template <class Element>
void VocabStats<Element>::exclude(int32_t distribution, std::span<const int32_t> ids,
                                  Exclusion& out) const {
  const auto at = static_cast<std::ptrdiff_t>(distribution * num_blocks_);
  out.ids = ids;
  out.block_max.assign(block_max_.begin() + at, block_max_.begin() + at + num_blocks_);
  out.block_sum.assign(block_sum_.begin() + at, block_sum_.begin() + at + num_blocks_);
  out.changed.clear();
  int64_t last_panel = -1;
  for (const int32_t id : ids) {
    const int64_t panel = id / kPanelColumns, block = panel / kBlockPanels;
    if (panel == last_panel || id >= V_) continue;
    last_panel = panel;
    if (out.changed.empty() || out.changed.back().block != block) {
      out.changed.push_back({.block = block, .panels = {}});
      if (holds(block)) out.changed.back().panels = kept_panels(distribution, block, nullptr);
    }
    if (!holds(block)) continue;
    BlockPanels& panels = out.changed.back().panels;
    alignas(64) float logits[kPanelColumns];
    panel_logits_left(distribution, panel, &out, logits);
    const LogitsRow row = {.logits = logits,
                           .scale = distributions_[static_cast<size_t>(distribution)].scale,
                           .block = &panels};
    const int columns = panel_columns(panel - first_block_ * kBlockPanels);
    const auto lane = static_cast<int>(panel % kBlockPanels);
    kernels_.panel_stats(&row, 1, columns, lane, false);
    if (panels.max[lane] == kNoMass) panels.sum[lane] = 0;  // infinity - infinity was NaN
  }
  for (const Exclusion::Changed& changed : out.changed) {
    const bool is_left =
        std::ranges::any_of(changed.panels.max, [](float m) { return m > kNoMass; });
    BlockStats stats = is_left ? BlockStats{} : BlockStats{.max = kNoMass};
    if (is_left && holds(changed.block)) stats = kernels_.merge_panels(changed.panels, false);
    out.block_max[static_cast<size_t>(changed.block)] = stats.max;
    out.block_sum[static_cast<size_t>(changed.block)] = stats.sum;
  }
}

template <class Element>
void VocabStats<Element>::finish_exclusion(Exclusion& out) const {
  out.row = {.max = *std::ranges::max_element(out.block_max)};
  if (out.row.max == kNoMass) return;
  out.factors.resize(out.block_max.size());
  kernels_.shifted_exp(out.block_max.data(), num_blocks_, 1.0f, out.row.max, out.factors.data());
  out.row.add_blocks(out.block_sum, out.factors);
}

template <class Element>
void VocabStats<Element>::panel_maxima(int32_t distribution, const Exclusion* left,
                                       std::vector<float>& out) const {
  out.resize(static_cast<size_t>(num_held_blocks_ * kBlockPanels));
  for (int64_t block = 0; block < num_held_blocks_; ++block) {
    std::copy_n(kept_panels(distribution, first_block_ + block, left).max, kBlockPanels,
                out.begin() + block * kBlockPanels);
  }
  out.resize(static_cast<size_t>(weight_.num_panels()));
}

// Inverse CDF: block, panel of that block, token of that panel.
template <class Element>
typename VocabStats<Element>::Drawn VocabStats<Element>::draw_from(int32_t distribution,
                                                                   const Masses& masses,
                                                                   double u) const {
  const double target = u * masses.row.total;
  const Pick block = pick_item(num_blocks_, 0, target, [&](int64_t i) {
    return masses.block_sum[i] * static_cast<double>(masses.factors[i]);
  });
  if (!holds(block.item)) return {};
  const BlockPanels& panels = kept_panels(distribution, block.item, masses.left);
  float panel_factors[kBlockPanels];
  kernels_.shifted_exp(panels.max, kBlockPanels, 1.0f, masses.row.max, panel_factors);
  const Pick panel = pick_item(kBlockPanels, block.before, target, [&](int64_t i) {
    return static_cast<double>(panels.sum[i]) * static_cast<double>(panel_factors[i]);
  });
  const int64_t index = block.item * kBlockPanels + panel.item;
  alignas(64) float logits[kPanelColumns];
  alignas(64) float mass[kPanelColumns];
  panel_logits_left(distribution, index, masses.left, logits);
  const int columns = panel_columns(index - first_block_ * kBlockPanels);
  kernels_.shifted_exp(logits, columns, distributions_[static_cast<size_t>(distribution)].scale,
                       masses.row.max, mass);
  const Pick token = pick_item(columns, panel.before, target,
                               [&](int64_t i) { return static_cast<double>(mass[i]); });
  return {.token = static_cast<int32_t>(index * kPanelColumns + token.item),
          .logit = logits[token.item]};
}

template <class Element>
typename VocabStats<Element>::Drawn VocabStats<Element>::greedy_from(int32_t distribution,
                                                                     const Masses& masses) const {
  const float max = masses.row.max;
  const int64_t block =
      std::find(masses.block_max, masses.block_max + num_blocks_, max) - masses.block_max;
  if (!holds(block)) return {};
  const BlockPanels& panels = kept_panels(distribution, block, masses.left);
  const int64_t panel = std::find(panels.max, panels.max + kBlockPanels, max) - panels.max;
  const int64_t index = block * kBlockPanels + panel;
  alignas(64) float logits[kPanelColumns];
  panel_logits_left(distribution, index, masses.left, logits);
  const float* best = std::find(logits, logits + kPanelColumns, max);
  return {.token = static_cast<int32_t>(index * kPanelColumns + (best - logits)), .logit = *best};
}

template <class Element>
typename VocabStats<Element>::Drawn VocabStats<Element>::draw(int32_t distribution,
                                                              const RowStats& row,
                                                              std::span<const float> factors,
                                                              double u) const {
  return draw_from(distribution,
                   {.row = row,
                    .block_sum = block_sum_.data() + distribution * num_blocks_,
                    .factors = factors.data()},
                   u);
}

template <class Element>
typename VocabStats<Element>::Drawn VocabStats<Element>::draw(int32_t distribution,
                                                              const Exclusion& left,
                                                              double u) const {
  return draw_from(distribution,
                   {.row = left.row,
                    .block_sum = left.block_sum.data(),
                    .factors = left.factors.data(),
                    .left = &left},
                   u);
}

template <class Element>
typename VocabStats<Element>::Drawn VocabStats<Element>::greedy(int32_t distribution,
                                                                const RowStats& row) const {
  return greedy_from(distribution,
                     {.row = row, .block_max = block_max_.data() + distribution * num_blocks_});
}

template <class Element>
typename VocabStats<Element>::Drawn VocabStats<Element>::greedy(int32_t distribution,
                                                                const Exclusion& left) const {
  return greedy_from(distribution,
                     {.row = left.row, .block_max = left.block_max.data(), .left = &left});
}

template class VocabStats<uint16_t>;
template class VocabStats<float>;

}  // namespace rollpack::kernels::cpu
