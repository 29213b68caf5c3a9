#include "kernels/cpu/truncation.h"

#include <algorithm>
#include <bit>

#include "kernels/cpu/distribution.h"
#include "kernels/cpu/kernel_table.h"

namespace rollpack::kernels::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Panels whose tokens estimate where a flat row is cut: 8,192 tokens give the share of mass above a
// limit to 0.4 % (one sigma). Three sigma and a little on each side then miss hardly ever, and what
// lies between, 3 % of the mass, is gathered quickly.
constexpr int64_t kSampledPanels = 128;
constexpr double kShareMargin = 0.015;

// Values that a bisection of samples or of panel maxima need not tell apart.
constexpr int64_t kCoarse = 16;

bool is_top_k_on(const SamplingParams& sampling, int64_t V) {
  return sampling.top_k > 0 && sampling.top_k < V;
}

int columns_of(const LogitsOfRow& row, int64_t panel) {
  return static_cast<int>(std::min<int64_t>(row.V - panel * kPanelColumns, kPanelColumns));
}

// Columns of ascending panels that are not banned.
class Allowed {
 public:
  explicit Allowed(std::span<const int32_t> banned) : banned_(banned) {}

  uint64_t columns(int64_t panel) {
    uint64_t all = ~uint64_t{0};
    const int64_t first = panel * kPanelColumns;
    while (next_ < banned_.size() && banned_[next_] < first) ++next_;
    for (; next_ < banned_.size() && banned_[next_] < first + kPanelColumns; ++next_) {
      all &= ~(uint64_t{1} << (banned_[next_] - first));
    }
    return all;
  }

 private:
  std::span<const int32_t> banned_;
  size_t next_ = 0;
};

uint64_t columns_from(const KernelTable& kernels, const LogitsOfRow& row, int64_t panel,
                      float limit) {
  const PanelMask mask = kernels.compare_panel(row.logits + panel * kPanelColumns,
                                               columns_of(row, panel), row.scale, limit);
  return mask.above | mask.equal;
}

// Columns that the cut keeps.
uint64_t columns_kept(const KernelTable& kernels, const LogitsOfRow& row, int64_t panel,
                      const Cut& cut) {
  const PanelMask mask = kernels.compare_panel(row.logits + panel * kPanelColumns,
                                               columns_of(row, panel), row.scale, cut.x);
  const int64_t ties = cut.id - panel * kPanelColumns + 1;  // columns up to the last token kept
  if (ties <= 0) return mask.above;
  if (ties >= kPanelColumns) return mask.above | mask.equal;
  return mask.above | (mask.equal & ((uint64_t{1} << ties) - 1));
}

}  // namespace

bool truncates(const SamplingParams& sampling, int64_t V) {
  return is_top_k_on(sampling, V) || sampling.top_p < 1.0f || sampling.min_p > 0.0f;
}

bool is_listed(const SamplingParams& sampling, int64_t V) {
  return is_top_k_on(sampling, V) && sampling.top_k <= kMaxListedTopK;
}

// ---- candidates of a top-k ----------------------------------------------------------------------

void TruncatedSampler::erase_banned(std::span<const int32_t> banned) {
  if (banned.empty()) return;
  size_t kept = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (std::binary_search(banned.begin(), banned.end(), ids[i])) continue;
    x[kept] = x[i];
    ids[kept++] = ids[i];
  }
  x.resize(kept);
  ids.resize(kept);
}

void TruncatedSampler::keep_top_k(const KernelTable& kernels, int32_t top_k) {
  if (static_cast<size_t>(top_k) >= ids.size()) return;
  bool is_reached = false;
  const Cut cut = finder_.find(kernels, {.x = x, .ids = ids, .weights = {}}, 0, top_k, is_reached);
  const auto kept = static_cast<size_t>(keep_first(kernels, x, ids, cut));
  x.resize(kept);
  ids.resize(kept);
}

void TruncatedSampler::sort_by_id() {
  if (std::ranges::is_sorted(ids)) return;
  by_id_.clear();
  for (size_t i = 0; i < ids.size(); ++i) {
    by_id_.push_back(static_cast<uint64_t>(ids[i]) << 32 | std::bit_cast<uint32_t>(x[i]));
  }
  std::sort(by_id_.begin(), by_id_.end());
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<int32_t>(by_id_[i] >> 32);
    x[i] = std::bit_cast<float>(static_cast<uint32_t>(by_id_[i]));
  }
}

TruncatedDraw TruncatedSampler::draw_listed(const KernelTable& kernels,
                                            const SamplingParams& sampling,
                                            std::span<const int32_t> banned, double u) {
  TruncatedDraw result;
  erase_banned(banned);
  if (ids.empty()) return result;
  keep_top_k(kernels, sampling.top_k);
  sort_by_id();
  result.max = *std::ranges::max_element(x);
  const auto count = static_cast<int64_t>(ids.size());
  mass_.resize(ids.size());
  kernels.shifted_exp(x.data(), count, 1.0f, result.max, mass_.data());
  Cut cut;
  if (sampling.top_p < 1.0f) {
    double total = 0;
    for (const float mass : mass_) total += static_cast<double>(mass);
    bool is_reached = false;
    cut = finder_.find(kernels, {.x = x, .ids = ids, .weights = mass_}, 0,
                       static_cast<double>(sampling.top_p) * total, is_reached);
  }
  for (size_t i = 0; i < ids.size(); ++i) {
    if (!cut.keeps(x[i], ids[i]) || mass_[i] < sampling.min_p) mass_[i] = 0;
    result.kept += static_cast<double>(mass_[i]);
  }
  const Pick pick = pick_item(count, 0, u * result.kept, [&](int64_t i) {
    return static_cast<double>(mass_[static_cast<size_t>(i)]);
  });
  result.token = ids[static_cast<size_t>(pick.item)];
  return result;
}

// ---- a row of logits ----------------------------------------------------------------------------

// Fills x and ids with the tokens of [low, high) and returns the weight of those from high on.
double TruncatedSampler::gather(const KernelTable& kernels, const LogitsOfRow& row,
                                std::span<const int32_t> banned, Weight weight, Limits limits) {
  x.clear();
  ids.clear();
  Allowed allowed(banned);
  double above = 0;
  for (int64_t panel = 0; panel < static_cast<int64_t>(row.panel_max.size()); ++panel) {
    if (row.panel_max[static_cast<size_t>(panel)] < limits.low) continue;
    const float* const logits = row.logits + panel * kPanelColumns;
    const uint64_t from_low =
        columns_from(kernels, row, panel, limits.low) & allowed.columns(panel);
    uint64_t from_high = 0;
    if (row.panel_max[static_cast<size_t>(panel)] >= limits.high) {
      from_high = columns_from(kernels, row, panel, limits.high) & from_low;
      above += weight == Weight::kOne
                   ? static_cast<double>(std::popcount(from_high))
                   : static_cast<double>(
                         kernels.panel_mass(logits, from_high, row.scale, row.max, 0.0f).mass);
    }
    for (uint64_t left = from_low & ~from_high; left != 0; left &= left - 1) {
      const int column = std::countr_zero(left);
      x.push_back(logits[column] * row.scale);
      ids.push_back(static_cast<int32_t>(panel * kPanelColumns + column));
    }
  }
  return above;
}

// Between which values a row is most likely cut that keeps this share of its weight, by a sample of
// its panels. Where the row is small: anywhere.
TruncatedSampler::Limits TruncatedSampler::sample_limits(const KernelTable& kernels,
                                                         const LogitsOfRow& row, Weight weight,
                                                         double share) {
  Limits limits = {-kInfinity, kInfinity};
  const int64_t stride = static_cast<int64_t>(row.panel_max.size()) / kSampledPanels;
  if (stride <= 1) return limits;
  // In logits, not in x: the order is the same.
  sample_.resize((kSampledPanels * 2 + 1) * kPanelColumns);
  int64_t count = 0;
  for (int64_t panel = 0; panel < static_cast<int64_t>(row.panel_max.size()); panel += stride) {
    std::copy_n(row.logits + panel * kPanelColumns, columns_of(row, panel), sample_.data() + count);
    count += columns_of(row, panel);
  }
  sample_.resize(static_cast<size_t>(count));
  double total = static_cast<double>(count);
  sample_mass_.clear();
  if (weight == Weight::kMass) {
    sample_mass_.resize(sample_.size());
    kernels.shifted_exp(sample_.data(), count, row.scale, row.max, sample_mass_.data());
    total = kernels.share_from(sample_.data(), sample_mass_.data(), count, -kInfinity).weight;
  }
  const float top = *std::ranges::max_element(sample_);
  const auto limit_at = [&](double part) {
    return bisect(kernels, sample_, sample_mass_, part * total, kCoarse, top);
  };
  limits.low = limit_at(share + kShareMargin).low * row.scale;
  if (share > kShareMargin) limits.high = limit_at(share - kShareMargin).high * row.scale;
  return limits;
}

// The first token in descending order at which the running weight reaches `target` of `total`.
Cut TruncatedSampler::find_cut(const KernelTable& kernels, const LogitsOfRow& row,
                               std::span<const int32_t> banned, Weight weight, double target,
                               double total) {
  // Where the largest token of every panel from some value on reach the target together, the cut
  // is not below that value: in peaked rows few panels are left.
  const std::span<const float> tops =
      weight == Weight::kMass ? std::span<const float>(panel_top_) : std::span<const float>();
  const Bracket bound = bisect(kernels, row.panel_max, tops, target, kCoarse, row.max);
  Limits limits = bound.is_reached ? Limits{bound.low, kInfinity}
                                   : sample_limits(kernels, row, weight, target / total);
  for (;;) {
    double above = gather(kernels, row, banned, weight, limits);
    const bool is_above = limits.high < kInfinity && above >= target;
    if (is_above) {
      limits = {limits.high, kInfinity};
      above = gather(kernels, row, banned, weight, limits);
    }
    if (weight == Weight::kMass) {
      mass_.resize(x.size());
      kernels.shifted_exp(x.data(), static_cast<int64_t>(x.size()), 1.0f, row.max, mass_.data());
    } else {
      mass_.clear();
    }
    bool is_reached = false;
    const Cut cut = finder_.find(kernels, {.x = x, .ids = ids, .weights = mass_, .top = row.max},
                                 above, target, is_reached);
    if (is_reached) return cut;
    // Another order of the same sum fell short of the target by its rounding: keep all of it.
    if (is_above || limits.low == -kInfinity) return {.x = limits.low};
    limits = {-kInfinity, limits.low};
  }
}

// Sum over kept tokens of exp(x - max), and their number.
double TruncatedSampler::fill_panel_masses(const KernelTable& kernels, const LogitsOfRow& row,
                                           std::span<const int32_t> banned, const Cut& cut,
                                           float min_p, int64_t* count) {
  panel_mass_.assign(row.panel_max.size(), 0.0f);
  Allowed allowed(banned);
  double kept = 0;
  *count = 0;
  for (size_t p = 0; p < row.panel_max.size(); ++p) {
    // exp rounds: a smaller x may have a mass that is larger by a unit in the last place.
    if (row.panel_max[p] < cut.x || panel_top_[p] < 0.9999f * min_p) continue;
    const auto panel = static_cast<int64_t>(p);
    const PanelKept at = kernels.panel_mass(
        row.logits + panel * kPanelColumns,
        columns_kept(kernels, row, panel, cut) & allowed.columns(panel), row.scale, row.max, min_p);
    panel_mass_[p] = at.mass;
    kept += static_cast<double>(at.mass);
    *count += std::popcount(at.columns);
  }
  return kept;
}

// Inverse CDF: panel, token of that panel.
TruncatedDraw TruncatedSampler::draw_kept(const KernelTable& kernels, const LogitsOfRow& row,
                                          const SamplingParams& sampling,
                                          std::span<const int32_t> banned, const Cut& cut,
                                          double u) {
  TruncatedDraw result{.max = row.max};
  int64_t count = 0;
  result.kept = fill_panel_masses(kernels, row, banned, cut, sampling.min_p, &count);
  result.is_whole = count == row.V;
  const double target = u * result.kept;
  const Pick panel = pick_item(static_cast<int64_t>(panel_mass_.size()), 0, target, [&](int64_t i) {
    return static_cast<double>(panel_mass_[static_cast<size_t>(i)]);
  });
  const float* const logits = row.logits + panel.item * kPanelColumns;
  const int columns = columns_of(row, panel.item);
  const uint64_t kept = kernels
                            .panel_mass(logits,
                                        columns_kept(kernels, row, panel.item, cut) &
                                            Allowed(banned).columns(panel.item),
                                        row.scale, row.max, sampling.min_p)
                            .columns;
  alignas(64) float mass[kPanelColumns];
  kernels.shifted_exp(logits, columns, row.scale, row.max, mass);
  const Pick token = pick_item(columns, panel.before, target, [&](int64_t i) {
    return (kept >> i & 1) != 0 ? static_cast<double>(mass[i]) : 0.0;
  });
  result.token = static_cast<int32_t>(panel.item * kPanelColumns + token.item);
  return result;
}

TruncatedDraw TruncatedSampler::draw(const KernelTable& kernels, const LogitsOfRow& row,
                                     const SamplingParams& sampling,
                                     std::span<const int32_t> banned, double u) {
  if (row.max == -kInfinity) return {};
  panel_top_.resize(row.panel_max.size());
  kernels.shifted_exp(row.panel_max.data(), static_cast<int64_t>(row.panel_max.size()), 1.0f,
                      row.max, panel_top_.data());
  double total = row.total;
  Cut cut;
  if (is_top_k_on(sampling, row.V)) {
    cut = find_cut(kernels, row, banned, Weight::kOne, sampling.top_k, static_cast<double>(row.V));
    int64_t count = 0;
    if (sampling.top_p < 1.0f) {
      total = fill_panel_masses(kernels, row, banned, cut, 0.0f, &count);
    }
  }
  if (sampling.top_p < 1.0f) {
    const Cut nucleus = find_cut(kernels, row, banned, Weight::kMass,
                                 static_cast<double>(sampling.top_p) * total, row.total);
    if (cut.keeps(nucleus.x, nucleus.id)) cut = nucleus;
  }
  return draw_kept(kernels, row, sampling, banned, cut, u);
}

}  // namespace rollpack::kernels::cpu
