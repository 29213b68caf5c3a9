#include "kernels/cpu/vocab_head.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/base/error.h"
#include "kernels/cpu/polynomial.h"
#include "kernels/philox.h"
#include "kernels/step/draft_draws.h"

namespace rollpack::kernels::cpu {
namespace {

// Rows whose logits are kept at a time, where samples are truncated: 19 MiB of a vocabulary of
// 152,000, and still five row tiles for every panel that is read.
constexpr size_t kMaxKeptRows = 32;

// The stop ids that min_tokens still keeps out of the support of the token at `position`.
std::span<const int32_t> banned_ids(const Slot& slot, int32_t position) {
  if (position >= slot.init.min_position) return {};
  return slot.init.stop_token_ids;
}

}  // namespace

template <class Element>
VocabHead<Element>::VocabHead(const KernelTable& kernels, PanelProducts<Element>& products,
                              int num_threads)
    : kernels_(kernels),
      stats_(kernels, products, num_threads),
      workspaces_(static_cast<size_t>(num_threads)) {}

template <class Element>
void VocabHead<Element>::run(ThreadPool& pool, StepContext& step, const PackedMatrix& weight,
                             const InputRows<Element>& in) {
  V_ = weight.columns;
  const int64_t num_blocks = (V_ + kBlockColumns - 1) / kBlockColumns;
  collect_queries(step);
  const bool with_entropy = std::ranges::any_of(queries_, &Query::wants_entropy);
  stats_.begin(weight, in, collect_distributions(in.rows, num_blocks), with_entropy);
  for (Workspace& work : workspaces_) {
    work.unit_factors.resize(static_cast<size_t>(num_blocks));
    work.scaled_factors.resize(static_cast<size_t>(num_blocks));
  }
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
    const bool is_cut = !is_greedy && truncates(sampling, V_);
    const bool is_top_k = is_cut && is_listed(sampling, V_);
    HeadResult& result = step.result.samples[i];
    result = {.slot = plan.samples[i].slot,
              .position = slot.next_position + num_draws_before(plan, i)};
    const auto num_banned = static_cast<int32_t>(banned_ids(slot, result.position).size());
    queries_.push_back({.head_row = step.sample_head_row[i],
                        .slot = plan.samples[i].slot,
                        .scale = is_greedy ? 1.0f : 1.0f / sampling.temperature,
                        .is_greedy = is_greedy,
                        .num_candidates = is_top_k ? sampling.top_k + num_banned : 0,
                        .needs_logits = is_cut && !is_top_k,
                        .wants_entropy = plan.wants_entropy,
                        .result = &result});
  }
  for (size_t i = 0; i < plan.scores.size(); ++i) {
    const ScoreRow& score = plan.scores[i];
    HeadResult& result = step.result.scores[i];
    result = {.position = plan.positions[static_cast<size_t>(score.row)] + 1, .token = score.token};
    queries_.push_back({.head_row = step.score_head_row[i],
                        .token = score.token,
                        .scale = score.temperature == 0 ? 1.0f : 1.0f / score.temperature,
                        .wants_entropy = true,
                        .result = &result});
  }
}

template <class Element>
std::vector<Distribution> VocabHead<Element>::collect_distributions(int64_t num_head_rows,
                                                                    int64_t num_blocks) {
  const auto before = [](const Distribution& a, const Distribution& b) {
    if (a.head_row != b.head_row) return a.head_row < b.head_row;
    if ((a.scale == 1.0f) != (b.scale == 1.0f)) return a.scale == 1.0f;
    return a.scale < b.scale;
  };
  const auto is_same = [](const Distribution& a, const Distribution& b) {
    return a.head_row == b.head_row && a.scale == b.scale;
  };
  std::vector<Distribution> all;
  for (int32_t row = 0; row < num_head_rows; ++row) all.push_back({.head_row = row});
  for (const Query& query : queries_) {
    all.push_back({.head_row = query.head_row, .scale = query.scale});
  }
  std::sort(all.begin(), all.end(), before);
  all.erase(std::unique(all.begin(), all.end(), is_same), all.end());
  int64_t num_kept = 0;
  for (Query& query : queries_) {
    const Distribution wanted{.head_row = query.head_row, .scale = query.scale};
    const auto found = std::lower_bound(all.begin(), all.end(), wanted, before);
    query.scaled = static_cast<int32_t>(found - all.begin());
    found->num_candidates = std::max(found->num_candidates, query.num_candidates);
    if (query.slot < 0 || found->first_block >= 0) continue;
    found->first_block = num_kept;
    num_kept += num_blocks;
  }
  return all;
}

// Rows that keep their logits come in groups, the others are one.
template <class Element>
void VocabHead<Element>::make_groups(int64_t num_head_rows) {
  std::vector<uint8_t> keeps(static_cast<size_t>(num_head_rows), 0);
  for (const Query& query : queries_) {
    if (query.needs_logits) keeps[static_cast<size_t>(query.head_row)] = 1;
  }
  groups_.assign(1, {});
  std::vector<size_t> group_of(static_cast<size_t>(num_head_rows), 0);
  for (int32_t row = 0; row < num_head_rows; ++row) {
    const auto index = static_cast<size_t>(row);
    if (keeps[index] != 0) {
      if (!groups_.back().keeps_logits || groups_.back().head_rows.size() == kMaxKeptRows) {
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
void VocabHead<Element>::run_group(ThreadPool& pool, const StepContext& step, const Group& group) {
  const int64_t stride = stats_.logits_stride();
  if (group.keeps_logits) {  // only ever grown: what resize() adds, it fills
    logits_.resize(std::max(logits_.size(), group.head_rows.size() * static_cast<size_t>(stride)));
  }
  stats_.compute(pool, group.head_rows, group.keeps_logits ? logits_.data() : nullptr);
  const auto num_queries = static_cast<int64_t>(group.queries.size());
  pool.parallel_for(num_queries, [&](int64_t index, int thread) {
    const auto q = static_cast<size_t>(group.queries[static_cast<size_t>(index)]);
    const Query& query = queries_[q];
    const float* logits = nullptr;
    if (query.needs_logits) {
      const auto row =
          std::lower_bound(group.head_rows.begin(), group.head_rows.end(), query.head_row) -
          group.head_rows.begin();
      logits = logits_.data() + row * stride;
    }
    finish_query(step, query, logits, workspaces_[static_cast<size_t>(thread)]);
  });
}

template <class Element>
void VocabHead<Element>::finish_query(const StepContext& step, const Query& query,
                                      const float* logits, Workspace& work) const {
  HeadResult& result = *query.result;
  result.entropy = std::numeric_limits<float>::quiet_NaN();
  const int32_t unit = stats_.first_distribution(query.head_row);
  const RowStats unit_row = stats_.merge(unit, work.unit_factors);
  const RowStats scaled_row =
      query.scaled == unit ? unit_row : stats_.merge(query.scaled, work.scaled_factors);
  // A low temperature may take finite logits past the largest float.
  if (!stats_.is_finite(query.head_row) || !std::isfinite(scaled_row.max)) {
    result.is_finite = false;
    result.token = std::max(query.token, 0);
    return;
  }
  const Token token = query.slot < 0 ? Token{query.token, stats_.logit(query.head_row, query.token)}
                                     : sample(step, query, scaled_row, logits, work);
  result.token = token.token;
  result.logprob = unit_row.logprob(token.logit);
  result.scaled_logprob = scaled_row.logprob(token.logit * query.scale);
  if (query.wants_entropy) result.entropy = scaled_row.entropy();
}

// Draws the token; a cut support also sets support_logmass.
template <class Element>
typename VocabHead<Element>::Token VocabHead<Element>::sample(const StepContext& step,
                                                              const Query& query,
                                                              const RowStats& row,
                                                              const float* logits,
                                                              Workspace& work) const {
  const Slot& slot = step.slots[static_cast<size_t>(query.slot)];
  const SlotInit& init = slot.init;
  const int32_t position = query.result->position;
  const double u = sampling_uniform(init.seed, init.prompt_hash, init.sample_index,
                                    static_cast<uint32_t>(position));
  const std::span<const int32_t> banned = banned_ids(slot, position);
  const bool is_cut = query.needs_logits || query.num_candidates > 0;
  if (banned.empty() && !is_cut) {
    if (query.is_greedy) return stats_.greedy(query.scaled, row);
    const bool is_unit = query.scaled == stats_.first_distribution(query.head_row);
    return stats_.draw(query.scaled, row, is_unit ? work.unit_factors : work.scaled_factors, u);
  }
  if (!banned.empty()) stats_.exclude(query.scaled, banned, work.left);
  if (!banned.empty() && work.left.row.max == -std::numeric_limits<float>::infinity()) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "stop_token_ids",
                 .value = std::to_string(init.stop_token_ids.size()) + " ids",
                 .message = "min_tokens leaves no token of the vocabulary to sample"});
  }
  if (query.is_greedy) return stats_.greedy(query.scaled, work.left);

  Token token;
  TruncatedDraw drawn;
  if (is_cut) {
    drawn = draw_truncated(query, init.sampling, row, banned, u, logits, work);
    token = {drawn.token, stats_.logit(query.head_row, drawn.token)};
  } else {
    drawn = {.max = work.left.row.max, .kept = work.left.row.total};
    token = stats_.draw(query.scaled, work.left, u);
  }
  if (!drawn.is_whole) {
    const double shift = static_cast<double>(drawn.max) - static_cast<double>(row.max);
    query.result->support_logmass =
        std::min(0.0f, static_cast<float>(log_f64(drawn.kept) + shift - row.log_total));
  }
  return token;
}

// Of a distribution that `work.left` describes where tokens are banned.
template <class Element>
TruncatedDraw VocabHead<Element>::draw_truncated(const Query& query, const SamplingParams& sampling,
                                                 const RowStats& row,
                                                 std::span<const int32_t> banned, double u,
                                                 const float* logits, Workspace& work) const {
  if (!query.needs_logits) {
    stats_.collect_candidates(query.scaled, work.sampler.x, work.sampler.ids);
    return work.sampler.draw_listed(kernels_, sampling, banned, u);
  }
  const Exclusion* const left = banned.empty() ? nullptr : &work.left;
  const RowStats& support = banned.empty() ? row : work.left.row;
  stats_.panel_maxima(query.scaled, left, work.panel_max);
  return work.sampler.draw(kernels_,
                           {.logits = logits,
                            .V = V_,
                            .scale = query.scale,
                            .panel_max = work.panel_max,
                            .max = support.max,
                            .total = support.total},
                           sampling, banned, u);
}

template <class Element>
void VocabHead<Element>::advance_slots(StepContext& step) {
  std::vector<HeadResult>& samples = step.result.samples;
  for (size_t i = 0; i < samples.size(); ++i) {
    HeadResult& result = samples[i];
    result.is_rejected = !is_draw_accepted(step.plan(), samples, i);
    if (result.is_rejected) continue;
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
