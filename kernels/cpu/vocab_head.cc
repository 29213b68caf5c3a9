#include "kernels/cpu/vocab_head.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/base/error.h"
#include "kernels/cpu/polynomial.h"
#include "kernels/philox.h"

namespace rollpack::kernels::cpu {
namespace {

// Rows of one task: 16 tiles of 6. More rows share a panel while it is in L2; fewer leave more
// tasks.
constexpr int64_t kChunkRows = 96;
// Logits kept at a time for truncated rows: 170 rows of a vocabulary of 49,152.
constexpr int64_t kMaxLogitsBytes = int64_t{32} << 20;

// The stop ids that min_tokens still keeps out of the support.
std::span<const int32_t> banned_ids(const Slot& slot) {
  if (slot.next_position >= slot.init.min_position) return {};
  return slot.init.stop_token_ids;
}

}  // namespace

template <class Element>
VocabHead<Element>::VocabHead(const KernelTable& kernels, int num_threads)
    : kernels_(kernels),
      of_(kernels.of<Element>()),
      workspaces_(static_cast<size_t>(num_threads)) {}

template <class Element>
void VocabHead<Element>::run(ThreadPool& pool, StepContext& step, const PackedMatrix& weight,
                             const InputRows<Element>& in) {
  weight_ = weight;
  in_ = in;
  num_blocks_ = (weight.columns + kBlockColumns - 1) / kBlockColumns;
  row_not_finite_.assign(static_cast<size_t>(in.rows), 0);
  collect_queries(step);
  collect_distributions(in.rows);
  make_groups(in.rows);
  for (const Group& group : groups_) run_group(pool, step, group);
  advance_slots(step);
}

template <class Element>
void VocabHead<Element>::collect_queries(StepContext& step) {
  const StepPlan& plan = step.plan();
  step.result.samples.resize(plan.samples.size());
  step.result.scores.resize(plan.scores.size());
  queries_.clear();
  for (size_t i = 0; i < plan.samples.size(); ++i) {
    const Slot& slot = step.slots[static_cast<size_t>(plan.samples[i].slot)];
    const SamplingParams& sampling = slot.init.sampling;
    const bool is_greedy = sampling.temperature == 0;
    HeadResult& result = step.result.samples[i];
    result = {.slot = plan.samples[i].slot, .position = slot.next_position};
    queries_.push_back({.head_row = step.sample_head_row[i],
                        .slot = plan.samples[i].slot,
                        .scale = is_greedy ? 1.0f : 1.0f / sampling.temperature,
                        .is_greedy = is_greedy,
                        .needs_logits = !banned_ids(slot).empty() ||
                                        (!is_greedy && truncates(sampling, weight_.columns)),
                        .wants_entropy = plan.wants_entropy,
                        .result = &result});
  }
  for (size_t i = 0; i < plan.scores.size(); ++i) {
    const ScoreRow& score = plan.scores[i];
    HeadResult& result = step.result.scores[i];
    result = {.position = plan.positions[static_cast<size_t>(score.row)] + 1,
              .token = score.token};
    queries_.push_back({.head_row = step.score_head_row[i],
                        .token = score.token,
                        .scale = score.temperature == 0 ? 1.0f : 1.0f / score.temperature,
                        .wants_entropy = true,
                        .result = &result});
  }
}

template <class Element>
void VocabHead<Element>::collect_distributions(int64_t num_head_rows) {
  const auto before = [](const Distribution& a, const Distribution& b) {
    if (a.head_row != b.head_row) return a.head_row < b.head_row;
    if ((a.scale == 1.0f) != (b.scale == 1.0f)) return a.scale == 1.0f;
    return a.scale < b.scale;
  };
  const auto is_same = [](const Distribution& a, const Distribution& b) {
    return a.head_row == b.head_row && a.scale == b.scale;
  };
  distributions_.clear();
  for (int32_t row = 0; row < num_head_rows; ++row) distributions_.push_back({.head_row = row});
  for (const Query& query : queries_) {
    distributions_.push_back({.head_row = query.head_row, .scale = query.scale});
  }
  std::sort(distributions_.begin(), distributions_.end(), before);
  distributions_.erase(std::unique(distributions_.begin(), distributions_.end(), is_same),
                       distributions_.end());
  int64_t num_panels = 0;
  for (Query& query : queries_) {
    const Distribution wanted{.head_row = query.head_row, .scale = query.scale};
    const auto found =
        std::lower_bound(distributions_.begin(), distributions_.end(), wanted, before);
    query.scaled = static_cast<int32_t>(found - distributions_.begin());
    if (query.slot < 0 || query.needs_logits || found->first_panel >= 0) continue;
    found->first_panel = num_panels;
    num_panels += num_blocks_ * kBlockPanels;
  }
  first_distribution_.assign(static_cast<size_t>(num_head_rows) + 1, 0);
  for (const Distribution& distribution : distributions_) {
    ++first_distribution_[static_cast<size_t>(distribution.head_row) + 1];
  }
  for (size_t row = 1; row < first_distribution_.size(); ++row) {
    first_distribution_[row] += first_distribution_[row - 1];
  }
  panels_.resize(static_cast<size_t>(num_panels));
  blocks_.resize(distributions_.size() * static_cast<size_t>(num_blocks_));
}

// Plain rows are one group; rows with a truncated sample come in groups whose logits fit.
template <class Element>
void VocabHead<Element>::make_groups(int64_t num_head_rows) {
  std::vector<uint8_t> keeps(static_cast<size_t>(num_head_rows), 0);
  for (const Query& query : queries_) {
    if (query.needs_logits) keeps[static_cast<size_t>(query.head_row)] = 1;
  }
  const int64_t row_bytes = weight_.columns * static_cast<int64_t>(sizeof(float));
  const auto max_rows = static_cast<size_t>(std::max<int64_t>(1, kMaxLogitsBytes / row_bytes));
  groups_.assign(1, {});
  std::vector<size_t> group_of(static_cast<size_t>(num_head_rows), 0);
  for (int32_t row = 0; row < num_head_rows; ++row) {
    const auto index = static_cast<size_t>(row);
    if (keeps[index] != 0) {
      if (!groups_.back().keeps_logits || groups_.back().head_rows.size() == max_rows) {
        groups_.push_back({.keeps_logits = true});
      }
      group_of[index] = groups_.size() - 1;
    }
    groups_[group_of[index]].head_rows.push_back(row);
  }
  for (size_t i = 0; i < queries_.size(); ++i) {
    groups_[group_of[static_cast<size_t>(queries_[i].head_row)]].queries.push_back(
        static_cast<int32_t>(i));
  }
}

template <class Element>
void VocabHead<Element>::find_group_rows(const Group& group) {
  const auto num_rows = static_cast<int64_t>(group.head_rows.size());
  if (num_rows == in_.rows) {
    group_in_ = in_;
    return;
  }
  group_rows_.resize(static_cast<size_t>(num_rows * in_.stride));
  for (int64_t row = 0; row < num_rows; ++row) {
    std::copy_n(in_.data + group.head_rows[static_cast<size_t>(row)] * in_.stride, in_.stride,
                group_rows_.data() + row * in_.stride);
  }
  group_in_ = {group_rows_.data(), in_.stride, num_rows};
}

template <class Element>
void VocabHead<Element>::run_group(ThreadPool& pool, const StepContext& step, const Group& group) {
  const auto num_rows = static_cast<int64_t>(group.head_rows.size());
  if (num_rows == 0) return;
  find_group_rows(group);
  if (group.keeps_logits) logits_.resize(static_cast<size_t>(num_rows * weight_.columns));
  const int64_t num_chunks = (num_rows + kChunkRows - 1) / kChunkRows;
  pool.parallel_for(num_blocks_ * num_chunks, [&](int64_t task, int thread) {
    const int64_t chunk = task % num_chunks;
    compute_block(group, task / num_chunks, num_rows * chunk / num_chunks,
                  num_rows * (chunk + 1) / num_chunks, workspaces_[static_cast<size_t>(thread)]);
  });
  const auto num_queries = static_cast<int64_t>(group.queries.size());
  pool.parallel_for(num_queries, [&](int64_t index, int thread) {
    const auto q = static_cast<size_t>(group.queries[static_cast<size_t>(index)]);
    const Query& query = queries_[q];
    const float* logits = nullptr;
    if (query.needs_logits) {
      const auto row = std::lower_bound(group.head_rows.begin(), group.head_rows.end(),
                                        query.head_row) - group.head_rows.begin();
      logits = logits_.data() + row * weight_.columns;
    }
    finish_query(step, query, logits, workspaces_[static_cast<size_t>(thread)]);
  });
}

template <class Element>
int VocabHead<Element>::panel_columns(int64_t panel) const {
  return static_cast<int>(
      std::clamp<int64_t>(weight_.columns - panel * kPanelColumns, 0, kPanelColumns));
}

// Rows [first, last) of the group against the 16 panels of a block.
template <class Element>
void VocabHead<Element>::compute_block(const Group& group, int64_t block, int64_t first,
                                       int64_t last, Workspace& work) {
  const auto first_of_row = [&](int64_t row) {
    const int32_t head_row = group.head_rows[static_cast<size_t>(row)];
    return static_cast<int64_t>(first_distribution_[static_cast<size_t>(head_row)]);
  };
  // A group's rows may have gaps, and so have their distributions: room for the whole span.
  const auto last_head_row = static_cast<size_t>(group.head_rows[static_cast<size_t>(last - 1)]);
  const int64_t first_distribution = first_of_row(first);
  const int64_t end_distribution = first_distribution_[last_head_row + 1];
  const auto needed =
      static_cast<size_t>((end_distribution - first_distribution) * kBlockPanels);
  if (work.panels.size() < needed) work.panels.resize(needed);

  const int64_t num_panels =
      std::min(kBlockPanels, weight_.num_panels() - block * kBlockPanels);
  const RowTiles tiles(last - first);
  alignas(64) float tile[kTileRows * kPanelColumns];
  for (int64_t p = 0; p < num_panels; ++p) {
    const int64_t panel = block * kBlockPanels + p;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t row = first + tiles.begin(t);
      const int rows = static_cast<int>(tiles.begin(t + 1) - tiles.begin(t));
      of_.panel_product(group_in_.data + row * group_in_.stride, group_in_.stride, rows,
                        weight_.panel<Element>(panel), weight_.steps(), tile, {});
      reduce_tile(group, tile, row, rows, panel, first_distribution, work.panels.data() + p);
    }
  }
  for (int64_t row = first; row < last; ++row) {
    const auto head_row = static_cast<size_t>(group.head_rows[static_cast<size_t>(row)]);
    for (int64_t d = first_distribution_[head_row]; d < first_distribution_[head_row + 1]; ++d) {
      const std::span<const PanelStats> panels(
          work.panels.data() + (d - first_distribution) * kBlockPanels,
          static_cast<size_t>(num_panels));
      blocks_[static_cast<size_t>(d * num_blocks_ + block)] = merge_panels(panels);
      const int64_t kept = distributions_[static_cast<size_t>(d)].first_panel;
      if (kept >= 0) std::ranges::copy(panels, panels_.begin() + kept + block * kBlockPanels);
    }
  }
}

template <class Element>
void VocabHead<Element>::reduce_tile(const Group& group, const float* tile, int64_t first, int rows,
                                     int64_t panel, int64_t first_distribution,
                                     PanelStats* stats) {
  const int columns = panel_columns(panel);
  for (int r = 0; r < rows; ++r) {
    const auto head_row = static_cast<size_t>(group.head_rows[static_cast<size_t>(first + r)]);
    const float* logits = tile + r * kPanelColumns;
    if (!kernels_.all_finite(logits, columns)) {
      // Relaxed: several threads store the same value, read after the loop's end.
      std::atomic_ref<uint8_t>(row_not_finite_[head_row]).store(1, std::memory_order_relaxed);
    }
    for (int64_t d = first_distribution_[head_row]; d < first_distribution_[head_row + 1]; ++d) {
      kernels_.panel_stats(logits, columns, distributions_[static_cast<size_t>(d)].scale,
                           stats + (d - first_distribution) * kBlockPanels);
    }
    if (group.keeps_logits) {
      std::copy_n(logits, columns,
                  logits_.data() + (first + r) * weight_.columns + panel * kPanelColumns);
    }
  }
}

template <class Element>
std::span<const BlockStats> VocabHead<Element>::blocks_of(int32_t distribution) const {
  return {blocks_.data() + distribution * num_blocks_, static_cast<size_t>(num_blocks_)};
}

template <class Element>
void VocabHead<Element>::panel_logits(int32_t head_row, int64_t panel, float* logits) const {
  of_.panel_product(in_.data + head_row * in_.stride, in_.stride, 1, weight_.panel<Element>(panel),
                    weight_.steps(), logits, {});
}

template <class Element>
void VocabHead<Element>::finish_query(const StepContext& step, const Query& query,
                                      const float* logits, Workspace& work) const {
  HeadResult& result = *query.result;
  result.entropy = std::numeric_limits<float>::quiet_NaN();
  const int32_t unit = first_distribution_[static_cast<size_t>(query.head_row)];
  const RowStats unit_row = merge_blocks(blocks_of(unit));
  const RowStats scaled_row =
      query.scaled == unit ? unit_row : merge_blocks(blocks_of(query.scaled));
  // A low temperature may take finite logits past the largest float.
  if (row_not_finite_[static_cast<size_t>(query.head_row)] != 0 ||
      !std::isfinite(scaled_row.max)) {
    result.is_finite = false;
    result.token = std::max(query.token, 0);
    return;
  }
  result.token = query.slot < 0 ? query.token : sample(step, query, scaled_row, logits, work);

  alignas(64) float panel[kPanelColumns];
  panel_logits(query.head_row, result.token / kPanelColumns, panel);
  const float logit = panel[result.token % kPanelColumns];
  result.logprob = unit_row.logprob(logit);
  result.scaled_logprob = scaled_row.logprob(logit * query.scale);
  if (query.wants_entropy) result.entropy = scaled_row.entropy();
}

// Draws the token; a cut support also sets support_logmass.
template <class Element>
int32_t VocabHead<Element>::sample(const StepContext& step, const Query& query, const RowStats& row,
                                   const float* logits, Workspace& work) const {
  const Slot& slot = step.slots[static_cast<size_t>(query.slot)];
  const std::span<const float> all(logits, static_cast<size_t>(weight_.columns));
  const SlotInit& init = slot.init;
  const double u = sampling_uniform(init.seed, init.prompt_hash, init.sample_index,
                                    static_cast<uint32_t>(slot.next_position));
  if (query.is_greedy && !query.needs_logits) return greedy(query, row);
  if (!query.needs_logits) return draw(query, row, u);

  TruncatedDraw drawn;
  if (query.is_greedy) {
    drawn.token = work.sampler.greedy(all, banned_ids(slot));
  } else {
    drawn = work.sampler.draw(kernels_, all, query.scale, init.sampling, banned_ids(slot), u);
  }
  if (drawn.token < 0) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "stop_token_ids",
                 .value = std::to_string(init.stop_token_ids.size()) + " ids",
                 .message = "min_tokens leaves no token of the vocabulary to sample"});
  }
  if (!query.is_greedy && !drawn.is_whole) {
    const double shift = static_cast<double>(drawn.max) - static_cast<double>(row.max);
    query.result->support_logmass =
        std::min(0.0f, static_cast<float>(log_f64(drawn.kept) + shift - row.log_total));
  }
  return drawn.token;
}

// Inverse CDF at u: block, panel of that block, token of that panel.
template <class Element>
int32_t VocabHead<Element>::draw(const Query& query, const RowStats& row, double u) const {
  const double target = u * row.total;
  const std::span<const BlockStats> blocks = blocks_of(query.scaled);
  const Pick block = pick_item(num_blocks_, 0, target, [&](int64_t i) {
    const BlockStats& stats = blocks[static_cast<size_t>(i)];
    return stats.sum * static_cast<double>(exp_f32(stats.max - row.max));
  });
  const int64_t first_panel = block.item * kBlockPanels;
  const int64_t num_panels = std::min(kBlockPanels, weight_.num_panels() - first_panel);
  const PanelStats* panels = panels_.data() +
                             distributions_[static_cast<size_t>(query.scaled)].first_panel +
                             first_panel;
  const Pick panel = pick_item(num_panels, block.before, target, [&](int64_t i) {
    return static_cast<double>(panels[i].sum) *
           static_cast<double>(exp_f32(panels[i].max - row.max));
  });
  alignas(64) float logits[kPanelColumns];
  alignas(64) float mass[kPanelColumns];
  panel_logits(query.head_row, first_panel + panel.item, logits);
  const int columns = panel_columns(first_panel + panel.item);
  kernels_.shifted_exp(logits, columns, query.scale, row.max, mass);
  const Pick token = pick_item(columns, panel.before, target,
                               [&](int64_t i) { return static_cast<double>(mass[i]); });
  return static_cast<int32_t>((first_panel + panel.item) * kPanelColumns + token.item);
}

template <class Element>
int32_t VocabHead<Element>::greedy(const Query& query, const RowStats& row) const {
  const PanelStats* panels =
      panels_.data() + distributions_[static_cast<size_t>(query.scaled)].first_panel;
  const PanelStats* found = std::find_if(panels, panels + weight_.num_panels(),
                                         [&](const PanelStats& p) { return p.max == row.max; });
  alignas(64) float logits[kPanelColumns];
  panel_logits(query.head_row, found - panels, logits);
  const float* best = std::find(logits, logits + kPanelColumns, row.max);
  return static_cast<int32_t>((found - panels) * kPanelColumns + (best - logits));
}

template <class Element>
void VocabHead<Element>::advance_slots(StepContext& step) {
  for (HeadResult& result : step.result.samples) {
    Slot& slot = step.slots[static_cast<size_t>(result.slot)];
    const std::vector<int32_t>& stops = slot.init.stop_token_ids;
    slot.pending_token = result.token;
    slot.next_position = result.position + 1;
    if (!result.is_finite) continue;
    if (result.position >= slot.init.min_position &&
        std::binary_search(stops.begin(), stops.end(), result.token)) {
      result.finish = SlotFinish::kStop;
    } else if (slot.next_position == slot.init.end_position) {
      result.finish = SlotFinish::kLength;
    }
  }
}

template class VocabHead<uint16_t>;
template class VocabHead<float>;

}  // namespace rollpack::kernels::cpu
