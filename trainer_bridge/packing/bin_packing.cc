#include "trainer_bridge/packing/bin_packing.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <set>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::bridge {
namespace {

void check_lengths(std::span<const int64_t> lengths, int64_t capacity) {
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] >= 0 && lengths[i] <= capacity) continue;
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = fmt::format("lengths[{}]", i),
                 .value = std::to_string(lengths[i]),
                 .allowed = fmt::format("0 to {}, the capacity of a bin", capacity),
                 .message = "an item is never split"});
  }
}

}  // namespace

std::vector<std::vector<int32_t>> pack_best_fit_decreasing(std::span<const int64_t> lengths,
                                                           int64_t capacity) {
  check_lengths(lengths, capacity);
  std::vector<int32_t> longest_first(lengths.size());
  std::iota(longest_first.begin(), longest_first.end(), 0);
  std::stable_sort(longest_first.begin(), longest_first.end(),
                   [&](int32_t a, int32_t b) { return lengths[a] > lengths[b]; });

  std::vector<std::vector<int32_t>> bins;
  // (remaining space, bin): the best bin for an item is the first entry that holds it. A search
  // tree over the spaces that occur, not over all of 0 .. capacity, as capacities reach 2^31.
  std::set<std::pair<int64_t, int32_t>> open_bins;
  for (const int32_t item : longest_first) {
    const int64_t length = lengths[item];
    const auto best = open_bins.lower_bound({length, 0});
    if (best == open_bins.end()) {
      open_bins.emplace(capacity - length, static_cast<int32_t>(bins.size()));
      bins.push_back({item});
      continue;
    }
    bins[best->second].push_back(item);
    auto node = open_bins.extract(best);
    node.value().first -= length;
    open_bins.insert(std::move(node));
  }

  for (std::vector<int32_t>& bin : bins) std::sort(bin.begin(), bin.end());
  std::sort(bins.begin(), bins.end());  // bins share no item, so their first items decide
  return bins;
}

}  // namespace rollpack::bridge
