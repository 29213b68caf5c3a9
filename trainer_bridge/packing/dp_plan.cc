#include "trainer_bridge/packing/dp_plan.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <utility>

#include "trainer_bridge/packing/bin_packing.h"
#include "trainer_bridge/packing/partition.h"

namespace rollpack::bridge {
namespace {

using Items = std::vector<int32_t>;

std::vector<int64_t> picked(std::span<const int64_t> values, const Items& items) {
  std::vector<int64_t> picked;
  picked.reserve(items.size());
  for (const int32_t item : items) picked.push_back(values[item]);
  return picked;
}

int64_t sum_of(std::span<const int64_t> values, const Items& items) {
  return std::accumulate(items.begin(), items.end(), int64_t{0},
                         [&](int64_t sum, int32_t item) { return sum + values[item]; });
}

// Bins of positions in `items` -> bins of those items.
RankRows named(const RankRows& positions, const Items& items) {
  RankRows rows;
  for (const Items& bin : positions) {
    Items& row = rows.emplace_back();
    for (const int32_t position : bin) row.push_back(items[position]);
  }
  return rows;
}

// What must stay together: samples, or groups.
std::vector<Items> units(std::span<const int64_t> groups, bool keeps_groups_whole) {
  std::vector<Items> units;
  for (size_t s = 0; s < groups.size(); ++s) {
    const bool is_new = !keeps_groups_whole || s == 0 || groups[s] != groups[s - 1];
    if (is_new) units.emplace_back();
    units.back().push_back(static_cast<int32_t>(s));
  }
  return units;
}

std::vector<Items> share_out(const std::vector<Items>& units, std::span<const int64_t> costs,
                             int32_t dp_size, PartSizes sizes) {
  std::vector<int64_t> unit_costs;
  unit_costs.reserve(units.size());
  for (const Items& unit : units) unit_costs.push_back(sum_of(costs, unit));
  std::vector<Items> ranks;
  for (const Items& part : partition_balanced(unit_costs, dp_size, sizes)) {
    Items& rank = ranks.emplace_back();
    for (const int32_t unit : part) {
      rank.insert(rank.end(), units[unit].begin(), units[unit].end());
    }
  }
  return ranks;
}

class RowPlanner {
 public:
  RowPlanner(std::span<const int64_t> lengths, std::span<const int64_t> costs, int64_t limit)
      : lengths_(lengths), costs_(costs), limit_(limit) {}

  RankRows fewest(const Items& items) const {
    return named(pack_best_fit_decreasing(picked(lengths_, items), limit_), items);
  }

  // `num_rows` rows, no fewer than fewest() has: the best balance that the limit allows.
  RankRows balanced(const Items& items, size_t num_rows) const {
    if (num_rows == 0) return {};
    RankRows rows = named(
        partition_balanced(picked(costs_, items), static_cast<int32_t>(num_rows), PartSizes::kAny),
        items);
    const bool fits = std::ranges::all_of(
        rows, [&](const Items& row) { return sum_of(lengths_, row) <= limit_; });
    if (!fits || wastes_rows(rows, items)) {
      auto greedy = costliest_first(items, num_rows);
      rows = greedy ? *std::move(greedy) : split(fewest(items), num_rows);
    }
    std::ranges::stable_sort(rows, [&](const Items& a, const Items& b) {
      return std::pair(-sum_of(costs_, a), a.empty()) < std::pair(-sum_of(costs_, b), b.empty());
    });
    return rows;
  }

 private:
  // Each sample to the cheapest row that has room; nothing where one finds none, or a row is left.
  std::optional<RankRows> costliest_first(Items items, size_t num_rows) const {
    std::ranges::stable_sort(items, [&](int32_t a, int32_t b) { return costs_[a] > costs_[b]; });
    RankRows rows(num_rows);
    std::vector<int64_t> costs(num_rows), tokens(num_rows);
    for (const int32_t item : items) {
      std::optional<size_t> best;
      for (size_t r = 0; r < num_rows; ++r) {
        if (tokens[r] + lengths_[item] > limit_) continue;
        if (!best || costs[r] < costs[*best]) best = r;
      }
      if (!best) return std::nullopt;
      rows[*best].push_back(item);
      costs[*best] += costs_[item];
      tokens[*best] += lengths_[item];
    }
    for (Items& row : rows) std::ranges::sort(row);
    if (wastes_rows(rows, items)) return std::nullopt;
    return rows;
  }

  static bool wastes_rows(const RankRows& rows, const Items& items) {
    const bool has_empty = std::ranges::any_of(rows, [](const Items& row) { return row.empty(); });
    return has_empty && items.size() >= rows.size();
  }

  // Rows that fit stay within the limit when they are split, so this always succeeds.
  RankRows split(RankRows rows, size_t num_rows) const {
    while (rows.size() < num_rows) {
      auto costliest = rows.end();
      for (auto row = rows.begin(); row != rows.end(); ++row) {
        if (row->size() < 2) continue;
        if (costliest == rows.end() || sum_of(costs_, *row) > sum_of(costs_, *costliest)) {
          costliest = row;
        }
      }
      if (costliest == rows.end()) {
        rows.resize(num_rows);
        break;
      }
      const Items whole = std::move(*costliest);
      RankRows halves =
          named(partition_balanced(picked(costs_, whole), 2, PartSizes::kEqual), whole);
      *costliest = std::move(halves[0]);
      rows.push_back(std::move(halves[1]));
    }
    return rows;
  }

  std::span<const int64_t> lengths_;
  std::span<const int64_t> costs_;
  int64_t limit_;
};

// Rows every rank must have, and how many of all those would be empty.
std::pair<size_t, size_t> rows_needed(const RowPlanner& planner, const std::vector<Items>& ranks) {
  size_t num_rows = 0, num_empty = 0;
  for (const Items& rank : ranks) num_rows = std::max(num_rows, planner.fewest(rank).size());
  for (const Items& rank : ranks) num_empty += num_rows - std::min(num_rows, rank.size());
  return {num_rows, num_empty};
}

}  // namespace

std::vector<RankRows> plan_ranks(std::span<const int64_t> lengths, std::span<const int64_t> groups,
                                 const DpPlanOptions& options) {
  std::vector<int64_t> costs;
  costs.reserve(lengths.size());
  for (const int64_t length : lengths) {
    costs.push_back(sequence_cost(length, options.parity_tokens));
  }
  const std::vector<Items> together = units(groups, options.keeps_groups_whole);
  const bool has_limit = options.max_tokens_per_row > 0;
  std::vector<Items> ranks =
      share_out(together, costs, options.dp_size, has_limit ? PartSizes::kAny : PartSizes::kEqual);
  std::vector<RankRows> plan(ranks.size());
  if (!has_limit) {
    for (size_t r = 0; r < ranks.size(); ++r) {
      for (const int32_t item : ranks[r]) plan[r].push_back({item});
    }
    return plan;
  }
  const RowPlanner planner(lengths, costs, options.max_tokens_per_row);
  auto [num_rows, num_empty] = rows_needed(planner, ranks);
  if (num_empty > 0) {  // few long samples on one rank, many short ones on another
    std::vector<Items> equal = share_out(together, costs, options.dp_size, PartSizes::kEqual);
    const auto [equal_rows, equal_empty] = rows_needed(planner, equal);
    if (equal_empty < num_empty) {
      ranks = std::move(equal);
      num_rows = equal_rows;
    }
  }
  for (size_t r = 0; r < ranks.size(); ++r) plan[r] = planner.balanced(ranks[r], num_rows);
  return plan;
}

}  // namespace rollpack::bridge
