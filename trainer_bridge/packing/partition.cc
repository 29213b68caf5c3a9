#include "trainer_bridge/packing/partition.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <set>
#include <tuple>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::bridge {
namespace {

constexpr int32_t kNone = std::numeric_limits<int32_t>::max();

// A part of a partial solution: a chain of items, its least first so that ties can look at it.
struct Part {
  int64_t sum = 0;
  int32_t least = kNone;
  int32_t head = kNone;
  int32_t tail = kNone;
};

bool is_larger(const Part& a, const Part& b) {
  return std::tuple(-a.sum, a.least) < std::tuple(-b.sum, b.least);
}

// One partial solution: its parts, the largest first.
using Solution = std::vector<Part>;

int64_t spread(const Solution& solution) {
  return solution.front().sum - solution.back().sum;
}

int32_t least_item(const Solution& solution) {
  int32_t least = kNone;
  for (const Part& part : solution) least = std::min(least, part.least);
  return least;
}

void check(std::span<const int64_t> costs, int32_t num_parts) {
  if (num_parts < 1) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "num_parts",
                 .value = std::to_string(num_parts),
                 .allowed = "1 or more"});
  }
  for (size_t i = 0; i < costs.size(); ++i) {
    if (costs[i] >= 0) continue;
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = fmt::format("costs[{}]", i),
                 .value = std::to_string(costs[i]),
                 .allowed = "0 or more"});
  }
}

// Each start holds one item, or with kEqual one item a part, neighbours in order of cost.
std::vector<Solution> starts(std::span<const int64_t> costs, size_t num_parts, PartSizes sizes) {
  std::vector<int32_t> largest_first(costs.size());
  std::iota(largest_first.begin(), largest_first.end(), 0);
  std::stable_sort(largest_first.begin(), largest_first.end(),
                   [&](int32_t a, int32_t b) { return costs[a] > costs[b]; });
  const size_t items_a_start = sizes == PartSizes::kEqual ? num_parts : 1;
  std::vector<Solution> solutions;
  for (size_t i = 0; i < largest_first.size(); ++i) {
    if (i % items_a_start == 0) solutions.emplace_back(num_parts);
    const int32_t item = largest_first[i];
    solutions.back()[i % items_a_start] = {costs[item], item, item, item};
  }
  return solutions;
}

void append(Part& part, const Part& other, std::vector<int32_t>& next) {
  if (other.head == kNone) return;
  part.sum += other.sum;
  part.least = std::min(part.least, other.least);
  if (part.head == kNone) {
    part.head = other.head;
  } else {
    next[part.tail] = other.head;
  }
  part.tail = other.tail;
}

void merge(Solution& into, const Solution& other, std::vector<int32_t>& next) {
  for (size_t p = 0; p < into.size(); ++p) append(into[p], other[into.size() - 1 - p], next);
  std::sort(into.begin(), into.end(), is_larger);
}

}  // namespace

std::vector<std::vector<int32_t>> partition_balanced(std::span<const int64_t> costs,
                                                     int32_t num_parts, PartSizes sizes) {
  check(costs, num_parts);
  std::vector<Solution> solutions = starts(costs, static_cast<size_t>(num_parts), sizes);
  std::vector<int32_t> next(costs.size(), kNone);
  // (-spread, least item, solution): no two solutions share an item, so the order is total.
  std::set<std::tuple<int64_t, int32_t, size_t>> open;
  const auto put = [&](size_t s) {
    open.emplace(-spread(solutions[s]), least_item(solutions[s]), s);
  };
  for (size_t s = 0; s < solutions.size(); ++s) put(s);
  while (open.size() > 1) {
    const size_t a = std::get<2>(open.extract(open.begin()).value());
    const size_t b = std::get<2>(open.extract(open.begin()).value());
    merge(solutions[a], solutions[b], next);
    put(a);
  }

  std::vector<std::vector<int32_t>> parts(static_cast<size_t>(num_parts));
  if (open.empty()) return parts;
  const Solution& whole = solutions[std::get<2>(*open.begin())];
  for (size_t p = 0; p < parts.size(); ++p) {
    for (int32_t item = whole[p].head; item != kNone; item = next[item]) parts[p].push_back(item);
    std::sort(parts[p].begin(), parts[p].end());
  }
  std::sort(parts.begin(), parts.end(), [](const auto& a, const auto& b) {
    return (a.empty() ? kNone : a.front()) < (b.empty() ? kNone : b.front());
  });
  return parts;
}

}  // namespace rollpack::bridge
