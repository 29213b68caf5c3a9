#include "kernels/cpu/candidates.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>

namespace rollpack::kernels::cpu {
namespace {

constexpr float kNoLimit = std::numeric_limits<float>::infinity();

}  // namespace

CandidateLists::CandidateLists(const KernelTable& kernels, int num_threads)
    : kernels_(kernels), threads_(static_cast<size_t>(num_threads)) {}

void CandidateLists::begin(std::span<const int32_t> counts) {
  counts_.assign(counts.begin(), counts.end());
  begins_.assign(counts.size() + 1, 0);
  for (size_t d = 0; d < counts.size(); ++d) {
    begins_[d + 1] = begins_[d] + static_cast<size_t>(capacity(counts[d]));
  }
  limits_.assign(counts.size(), -kNoLimit);
  for (Lists& lists : threads_) {
    // Only ever grown: what a list held before is overwritten before it is read.
    lists.x.resize(std::max(lists.x.size(), begins_.back()));
    lists.ids.resize(lists.x.size());
    lists.sizes.assign(counts.size(), 0);
  }
}

bool CandidateLists::may_hold(int32_t distribution, float panel_max) const {
  const auto d = static_cast<size_t>(distribution);
  if (counts_[d] == 0) return false;
  // Relaxed: an old limit is a valid one. Pairs with the exchange in cut_back().
  auto& limit = const_cast<float&>(limits_[d]);
  return panel_max >= std::atomic_ref<float>(limit).load(std::memory_order_relaxed);
}

void CandidateLists::add(int thread, int32_t distribution, const float* logits, int columns,
                         float scale, int32_t first_id) {
  Lists& lists = threads_[static_cast<size_t>(thread)];
  const auto d = static_cast<size_t>(distribution);
  const auto wanted = [&] {
    const PanelMask mask = kernels_.compare_panel(
        logits, columns, scale, std::atomic_ref<float>(limits_[d]).load(std::memory_order_relaxed));
    return mask.above | mask.equal;
  };
  uint64_t mask = wanted();
  const int32_t room = capacity(counts_[d]) - lists.sizes[d];
  if (room < kPanelColumns && std::popcount(mask) > room) {
    cut_back(lists, distribution);
    mask = wanted();
  }
  float* const x = lists.x.data() + begins_[d];
  int32_t* const ids = lists.ids.data() + begins_[d];
  int32_t size = lists.sizes[d];
  for (; mask != 0; mask &= mask - 1, ++size) {
    const int column = std::countr_zero(mask);
    x[size] = logits[column] * scale;
    ids[size] = first_id + column;
  }
  lists.sizes[d] = size;
}

// Keeps the wanted number of a thread's tokens, or some more. So many are at least as large as the
// last of them, so its value is a limit for every thread.
void CandidateLists::cut_back(Lists& lists, int32_t distribution) {
  const auto d = static_cast<size_t>(distribution);
  const std::span<float> x(lists.x.data() + begins_[d], static_cast<size_t>(lists.sizes[d]));
  const std::span<int32_t> ids(lists.ids.data() + begins_[d], x.size());
  const int32_t count = counts_[d];
  const Bracket bracket = bisect(kernels_, x, {}, count, kPanelColumns / 2 + count / 8, kNoLimit);
  Cut cut = {.x = bracket.low};
  if (bracket.num_from_low > count + count / 2) {  // many equal values: told apart by their ids
    bool is_reached = false;
    cut = lists.finder.find(kernels_, {.x = x, .ids = ids, .weights = {}}, 0, count, is_reached);
  }
  lists.sizes[d] = static_cast<int32_t>(keep_first(kernels_, x, ids, cut));
  std::atomic_ref<float> limit(limits_[d]);
  float seen = limit.load(std::memory_order_relaxed);
  while (seen < cut.x && !limit.compare_exchange_weak(seen, cut.x, std::memory_order_relaxed)) {
  }
}

void CandidateLists::collect(int32_t distribution, std::vector<float>& x,
                             std::vector<int32_t>& ids) const {
  const auto d = static_cast<size_t>(distribution);
  x.clear();
  ids.clear();
  for (const Lists& lists : threads_) {
    const auto begin = static_cast<std::ptrdiff_t>(begins_[d]);
    const std::ptrdiff_t end = begin + lists.sizes[d];
    x.insert(x.end(), lists.x.begin() + begin, lists.x.begin() + end);
    ids.insert(ids.end(), lists.ids.begin() + begin, lists.ids.begin() + end);
  }
}

}  // namespace rollpack::kernels::cpu
