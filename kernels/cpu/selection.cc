#include "kernels/cpu/selection.h"

#include <algorithm>
#include <bit>

namespace rollpack::kernels::cpu {
namespace {

// Tokens that are cheaper to sort than to halve once more.
constexpr int64_t kSortable = 64;

// Distance from the largest value within which most cuts are: exp(-16) is 1e-7.
constexpr float kNear = 16.0f;

// Integers in the order of the floats that they stand for; -0 and +0 are one.
uint32_t order_of(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value + 0.0f);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

float value_of(uint32_t order) {
  return std::bit_cast<float>((order >> 31) != 0 ? order & 0x7fffffffu : ~order);
}

std::span<const float> panel_of(std::span<const float> x, size_t begin) {
  return x.subspan(begin, std::min<size_t>(x.size() - begin, kPanelColumns));
}

uint64_t entries_from(const KernelTable& kernels, std::span<const float> part, float limit) {
  const PanelMask mask =
      kernels.compare_panel(part.data(), static_cast<int>(part.size()), 1.0f, limit);
  return mask.above | mask.equal;
}

}  // namespace

int64_t keep_first(const KernelTable& kernels, std::span<float> x, std::span<int32_t> ids,
                   const Cut& cut) {
  size_t kept = 0;
  for (size_t begin = 0; begin < x.size(); begin += kPanelColumns) {
    const std::span<const float> part = panel_of(x, begin);
    const PanelMask mask =
        kernels.compare_panel(part.data(), static_cast<int>(part.size()), 1.0f, cut.x);
    for (uint64_t left = mask.above | mask.equal; left != 0; left &= left - 1) {
      const int entry = std::countr_zero(left);
      const size_t i = begin + static_cast<size_t>(entry);
      if ((mask.equal >> entry & 1) != 0 && ids[i] > cut.id) continue;
      x[kept] = x[i];
      ids[kept++] = ids[i];
    }
  }
  return static_cast<int64_t>(kept);
}

Bracket bisect(const KernelTable& kernels, std::span<const float> x, std::span<const float> weights,
               double target, int64_t max_between, float top) {
  const auto n = static_cast<int64_t>(x.size());
  const float* const each = weights.empty() ? nullptr : weights.data();
  Bracket bracket;
  const ListShare all = kernels.share_from(x.data(), each, n, bracket.low);
  bracket.is_reached = all.weight >= target;
  if (!bracket.is_reached) return bracket;
  bracket.num_from_low = all.count;
  int64_t num_from_high = 0;
  uint32_t low = order_of(bracket.low), high = order_of(top) + 1;
  // Most weight is near the top: a first guess there spares the halving of 32 bits of order.
  uint32_t middle = order_of(top - kNear);
  while (bracket.num_from_low - num_from_high > max_between && high - low > 1) {
    if (middle <= low || middle >= high) middle = low + (high - low) / 2;
    const float limit = value_of(middle);
    const ListShare share = kernels.share_from(x.data(), each, n, limit);
    if (share.weight >= target) {
      low = middle;
      bracket.low = limit;
      bracket.num_from_low = share.count;
    } else {
      high = middle;
      bracket.high = limit;
      bracket.above = share.weight;
      num_from_high = share.count;
    }
  }
  return bracket;
}

Cut CutFinder::find(const KernelTable& kernels, const Candidates& all, double above, double target,
                    bool& is_reached) {
  const Bracket bracket = bisect(kernels, all.x, all.weights, target - above, kSortable, all.top);
  is_reached = bracket.is_reached;
  if (!is_reached) return {};
  between_.clear();
  for (size_t begin = 0; begin < all.x.size(); begin += kPanelColumns) {
    const std::span<const float> part = panel_of(all.x, begin);
    uint64_t left = entries_from(kernels, part, bracket.low);
    if (left == 0) continue;
    left &= ~entries_from(kernels, part, bracket.high);
    for (; left != 0; left &= left - 1) {
      const size_t i = begin + static_cast<size_t>(std::countr_zero(left));
      between_.push_back({.key = static_cast<uint64_t>(~order_of(all.x[i])) << 32 |
                                 static_cast<uint32_t>(all.ids[i]),
                          .weight = all.weights.empty() ? 1.0f : all.weights[i]});
    }
  }
  std::sort(between_.begin(), between_.end(),
            [](const Entry& a, const Entry& b) { return a.key < b.key; });
  double running = above + bracket.above;
  // Rounding may leave the sum over single tokens short of the target: the last one is kept then.
  uint64_t last = 0;
  for (const Entry& entry : between_) {
    last = entry.key;
    running += static_cast<double>(entry.weight);
    if (running >= target) break;
  }
  return {.x = value_of(~static_cast<uint32_t>(last >> 32)),
          .id = static_cast<int32_t>(last & 0xffffffffu)};
}

}  // namespace rollpack::kernels::cpu
