#include "kernels/cpu/vocab_head.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

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
                              int num_threads, VocabExchange exchange)
    : kernels_(kernels),
      exchange_(std::move(exchange)),
      stats_(kernels, products, num_threads),
      workspaces_(static_cast<size_t>(num_threads)) {}

template <class Element>
void VocabHead<Element>::run(ThreadPool& pool, StepContext& step, const PackedMatrix& weight,
                             const InputRows<Element>& in) {
  V_ = exchange_.part().V;
  const int64_t num_blocks = (V_ + kBlockColumns - 1) / kBlockColumns;
  const int64_t num_held_blocks = (weight.columns + kBlockColumns - 1) / kBlockColumns;
  collect_queries(step);
  const bool with_entropy = std::ranges::any_of(queries_, &Query::wants_entropy);
  stats_.begin(weight, exchange_.part(), in, collect_distributions(in.rows, num_held_blocks),
               with_entropy);
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
    const std::span<const int32_t> banned = banned_ids(slot, result.position);
    const auto num_banned = static_cast<int32_t>(banned.size());
    queries_.push_back({.head_row = step.sample_head_row[i],
                        .slot = plan.samples[i].slot,
                        .scale = is_greedy ? 1.0f : 1.0f / sampling.temperature,
                        .is_greedy = is_greedy,
                        .num_candidates = is_top_k ? sampling.top_k + num_banned : 0,
                        .needs_logits = is_cut && !is_top_k,
                        .wants_entropy = plan.wants_entropy,
                        .banned = banned,
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
  if (std::ranges::any_of(queries_, [](const Query& query) { return !query.banned.empty(); })) {
    left_.resize(std::max(left_.size(), queries_.size()));
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

// Calls task(position in the group, index of the query, workspace) for the group's queries.
template <class Element>
template <class Task>
void VocabHead<Element>::for_queries(ThreadPool& pool, const Group& group, const Task& task) {
  pool.parallel_for(static_cast<int64_t>(group.queries.size()), [&](int64_t i, int thread) {
    task(i, static_cast<size_t>(group.queries[static_cast<size_t>(i)]),
         workspaces_[static_cast<size_t>(thread)]);
  });
}

template <class Element>
void VocabHead<Element>::run_group(ThreadPool& pool, const StepContext& step, const Group& group) {
  if (group.keeps_logits) {  // only ever grown: what resize() adds, it fills
    const auto stride = static_cast<size_t>(stats_.logits_stride());
    logits_.resize(std::max(logits_.size(), group.head_rows.size() * stride));
  }
  stats_.compute(pool, group.head_rows, group.keeps_logits ? logits_.data() : nullptr);
  if (exchange_.is_alone()) {
    for_queries(pool, group, [&](int64_t i, size_t index, Workspace& work) {
      prepare(index);
      if (!queries_[index].banned.empty()) stats_.finish_exclusion(left_[index]);
      conclude(index, choose(step, index, kept_row(group, queries_[index], i, work), work), work);
    });
    return;
  }
  if (group.queries.empty()) return;
  exchange_group(pool, group);
  choices_.assign(group.queries.size(), {});
  for_queries(pool, group, [&](int64_t i, size_t index, Workspace& work) {
    // A draw that needs a whole row of logits is one rank's; who can tell a logit does so
    // elsewhere.
    const bool is_mine = i % exchange_.at().size == exchange_.at().rank;
    if (queries_[index].needs_logits && !is_mine) return;
    choices_[static_cast<size_t>(i)] =
        choose(step, index, kept_row(group, queries_[index], i, work), work);
  });
  exchange_.share_choices(choices_);
  for_queries(pool, group, [&](int64_t i, size_t index, Workspace& work) {
    conclude(index, choices_[static_cast<size_t>(i)], work);
  });
}

// Statistics, then what exclusions, lists and rows of logits are of the whole vocabulary.
template <class Element>
void VocabHead<Element>::exchange_group(ThreadPool& pool, const Group& group) {
  exchange_.share(stats_);
  for_queries(pool, group, [&](int64_t, size_t index, Workspace&) { prepare(index); });
  std::vector<Exclusion*> excluded;
  std::vector<CandidateList*> lists;
  listed_.resize(queries_.size());
  for (const int32_t q : group.queries) {
    const auto index = static_cast<size_t>(q);
    const Query& query = queries_[index];
    if (query.is_void) continue;
    if (!query.banned.empty()) excluded.push_back(&left_[index]);
    if (query.num_candidates == 0) continue;
    CandidateList& list = listed_[index];
    list.count = query.num_candidates;
    stats_.collect_candidates(query.scaled, list.x, list.ids);
    lists.push_back(&list);
  }
  exchange_.share_exclusions(excluded);
  for (Exclusion* left : excluded) stats_.finish_exclusion(*left);
  exchange_.share_candidates(lists);
  if (!group.keeps_logits) return;

  const auto rows = static_cast<int64_t>(group.head_rows.size());
  all_logits_.resize(
      std::max(all_logits_.size(), static_cast<size_t>(rows * exchange_.logits_stride())));
  exchange_.share_logits(logits_.data(), rows, all_logits_.data());
  const auto num_queries = static_cast<int64_t>(group.queries.size());
  std::vector<float> held;
  for (const int32_t q : group.queries) {
    const auto index = static_cast<size_t>(q);
    const Query& query = queries_[index];
    std::vector<float> maxima(static_cast<size_t>(stats_.logits_stride() / kPanelColumns));
    if (query.needs_logits && !query.is_void) {
      stats_.panel_maxima(query.scaled, query.banned.empty() ? nullptr : &left_[index], maxima);
    }
    held.insert(held.end(), maxima.begin(), maxima.end());
  }
  all_panel_max_.resize(static_cast<size_t>(num_queries * exchange_.num_panels()));
  exchange_.share_panels(held.data(), num_queries, all_panel_max_.data());
}

// Finds void rows, and takes banned ids out.
template <class Element>
void VocabHead<Element>::prepare(size_t index) {
  Query& query = queries_[index];
  // A low temperature may take finite logits past the largest float.
  query.is_void = !stats_.is_finite(query.head_row) || !std::isfinite(stats_.max_of(query.scaled));
  if (query.is_void || query.banned.empty()) return;
  stats_.exclude(query.scaled, query.banned, left_[index]);
}

template <class Element>
typename VocabHead<Element>::KeptRow VocabHead<Element>::kept_row(const Group& group,
                                                                  const Query& query, int64_t i,
                                                                  Workspace& work) const {
  if (!query.needs_logits || query.is_void) return {};
  const auto row =
      std::lower_bound(group.head_rows.begin(), group.head_rows.end(), query.head_row) -
      group.head_rows.begin();
  if (!exchange_.is_alone()) {
    const auto num_panels = static_cast<size_t>(exchange_.num_panels());
    return {.logits = all_logits_.data() + row * exchange_.logits_stride(),
            .panel_max =
                std::span(all_panel_max_).subspan(static_cast<size_t>(i) * num_panels, num_panels)};
  }
  const auto index = static_cast<size_t>(&query - queries_.data());
  stats_.panel_maxima(query.scaled, query.banned.empty() ? nullptr : &left_[index], work.panel_max);
  return {.logits = logits_.data() + row * stats_.logits_stride(), .panel_max = work.panel_max};
}

template <class Element>
Choice VocabHead<Element>::choose(const StepContext& step, size_t index, const KeptRow& kept,
                                  Workspace& work) const {
  const Query& query = queries_[index];
  if (query.is_void) return {};
  if (query.slot >= 0) return sample(step, index, kept, work);
  if (!stats_.holds_token(query.token)) return {};
  return {.token = query.token, .logit = stats_.logit(query.head_row, query.token)};
}

template <class Element>
void VocabHead<Element>::conclude(size_t index, const Choice& choice, Workspace& work) const {
  const Query& query = queries_[index];
  HeadResult& result = *query.result;
  result.entropy = std::numeric_limits<float>::quiet_NaN();
  if (query.is_void) {
    result.is_finite = false;
    result.token = std::max(query.token, 0);
    return;
  }
  const int32_t unit = stats_.first_distribution(query.head_row);
  const RowStats unit_row = stats_.merge(unit, work.unit_factors);
  const RowStats scaled_row =
      query.scaled == unit ? unit_row : stats_.merge(query.scaled, work.scaled_factors);
  result.token = choice.token;
  result.support_logmass = choice.support_logmass;
  result.logprob = unit_row.logprob(choice.logit);
  result.scaled_logprob = scaled_row.logprob(choice.logit * query.scale);
  if (query.wants_entropy) result.entropy = scaled_row.entropy();
}

// Draws the token; a cut support also sets support_logmass.
template <class Element>
Choice VocabHead<Element>::sample(const StepContext& step, size_t index, const KeptRow& kept,
                                  Workspace& work) const {
  const Query& query = queries_[index];
  const Slot& slot = step.slots[static_cast<size_t>(query.slot)];
  const SlotInit& init = slot.init;
  const auto position = static_cast<uint32_t>(query.result->position);
  const double u = sampling_uniform(init.seed, init.prompt_hash, init.sample_index, position);
  const RowStats row = stats_.merge(query.scaled, work.scaled_factors);
  const bool is_cut = query.needs_logits || query.num_candidates > 0;
  const auto chosen = [](const auto& drawn) -> Choice {
    return {.token = drawn.token, .logit = drawn.logit};
  };
  if (query.banned.empty() && !is_cut) {
    if (query.is_greedy) return chosen(stats_.greedy(query.scaled, row));
    return chosen(stats_.draw(query.scaled, row, work.scaled_factors, u));
  }
  const Exclusion* const left = query.banned.empty() ? nullptr : &left_[index];
  if (left != nullptr && left->row.max == -std::numeric_limits<float>::infinity()) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "stop_token_ids",
                 .value = std::to_string(init.stop_token_ids.size()) + " ids",
                 .message = "min_tokens leaves no token of the vocabulary to sample"});
  }
  if (query.is_greedy) return chosen(stats_.greedy(query.scaled, *left));

  Choice choice;
  TruncatedDraw drawn;
  if (is_cut) {
    drawn = draw_truncated(index, init.sampling, row, u, kept, work);
    if (!query.needs_logits && !stats_.holds_token(drawn.token)) return {};
    choice = {.token = drawn.token,
              .logit = query.needs_logits ? kept.logits[drawn.token]
                                          : stats_.logit(query.head_row, drawn.token)};
  } else {
    drawn = {.max = left->row.max, .kept = left->row.total};
    choice = chosen(stats_.draw(query.scaled, *left, u));
  }
  if (!drawn.is_whole) {
    const double shift = static_cast<double>(drawn.max) - static_cast<double>(row.max);
    choice.support_logmass =
        std::min(0.0f, static_cast<float>(log_f64(drawn.kept) + shift - row.log_total));
  }
  return choice;
}

// Of a distribution that left_[index] describes where tokens are banned.
template <class Element>
TruncatedDraw VocabHead<Element>::draw_truncated(size_t index, const SamplingParams& sampling,
                                                 const RowStats& row, double u, const KeptRow& kept,
                                                 Workspace& work) const {
  const Query& query = queries_[index];
  if (!query.needs_logits) {
    if (exchange_.is_alone()) {
      stats_.collect_candidates(query.scaled, work.sampler.x, work.sampler.ids);
    } else {
      work.sampler.x = listed_[index].x;
      work.sampler.ids = listed_[index].ids;
    }
    return work.sampler.draw_listed(kernels_, sampling, query.banned, u);
  }
  const RowStats& support = query.banned.empty() ? row : left_[index].row;
  return work.sampler.draw(kernels_,
                           {.logits = kept.logits,
                            .V = V_,
                            .scale = query.scale,
                            .panel_max = kept.panel_max,
                            .max = support.max,
                            .total = support.total},
                           sampling, query.banned, u);
}

template <class Element>
void VocabHead<Element>::advance_slots(StepContext& step) {
  std::vector<HeadResult>& samples = step.result.samples;
  for (size_t i = 0; i < samples.size(); ++i) {
    HeadResult& result = samples[i];
    Slot& slot = step.slots[static_cast<size_t>(result.slot)];
    result.is_rejected = slot.is_finished || !is_draw_accepted(step.plan(), samples, i);
    if (result.is_rejected) continue;
    const std::vector<int32_t>& stops = slot.init.stop_token_ids;
    slot.pending_token = result.token;
    slot.next_position = result.position + 1;
    slot.is_finished = !result.is_finite;
    if (!result.is_finite) continue;
    if (result.position >= slot.init.min_position &&
        std::binary_search(stops.begin(), stops.end(), result.token)) {
      result.finish = SlotFinish::kStop;
    } else if (slot.next_position == slot.init.end_position) {
      result.finish = SlotFinish::kLength;
    }
    slot.is_finished = result.finish != SlotFinish::kRunning;
  }
}

template class VocabHead<uint16_t>;
template class VocabHead<float>;

}  // namespace rollpack::kernels::cpu
