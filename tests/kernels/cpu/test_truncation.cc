// Supports of top-k, top-p and min-p against their definition in f64, on logits with many ties:
// from a row of logits and, where there is a top-k, from lists of candidates.
#include "kernels/cpu/truncation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "kernels/cpu/candidates.h"
#include "kernels/cpu/float_mode.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/polynomial.h"
#include "tests/sanitized.h"
#include "toy_model.h"

namespace rollpack::kernels::cpu {
namespace {

using testing::Numbers;

// Ids kept, ascending, by the definition: sort, cut, renormalise, cut.
std::vector<int32_t> kept_ids(const std::vector<float>& logits, float scale,
                              const SamplingParams& sampling, const std::vector<int32_t>& banned) {
  std::vector<int32_t> ids;
  for (int32_t id = 0; id < static_cast<int32_t>(logits.size()); ++id) {
    if (!std::binary_search(banned.begin(), banned.end(), id)) ids.push_back(id);
  }
  const auto x = [&](int32_t id) {
    return static_cast<double>(logits[static_cast<size_t>(id)] * scale);
  };
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return x(a) > x(b); });
  if (ids.empty()) return ids;
  const double max = x(ids.front());
  if (sampling.top_k > 0 && sampling.top_k < static_cast<int32_t>(ids.size())) {
    ids.resize(static_cast<size_t>(sampling.top_k));
  }
  double total = 0;
  for (const int32_t id : ids) total += std::exp(x(id) - max);
  double running = 0;
  std::vector<int32_t> kept;
  for (const int32_t id : ids) {
    const double mass = std::exp(x(id) - max);
    if (mass >= static_cast<double>(sampling.min_p)) kept.push_back(id);
    running += mass;
    if (sampling.top_p < 1.0f && running >= static_cast<double>(sampling.top_p) * total) break;
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

// A row with what the head knows of it: the largest value of each panel, and the mass.
class Row {
 public:
  Row(const std::vector<float>& logits, float scale, const std::vector<int32_t>& banned)
      : logits_(logits), V_(static_cast<int64_t>(logits.size())), scale_(scale) {
    const size_t panels = (logits.size() + kPanelColumns - 1) / kPanelColumns;
    logits_.resize(panels * kPanelColumns, 1e9f);  // past the vocabulary: no meaning
    panel_max_.assign(panels, -std::numeric_limits<float>::infinity());
    std::vector<float> x;
    for (int32_t id = 0; id < V_; ++id) {
      if (std::binary_search(banned.begin(), banned.end(), id)) continue;
      x.push_back(logits[static_cast<size_t>(id)] * scale);
      float& max = panel_max_[static_cast<size_t>(id / kPanelColumns)];
      max = std::max(max, x.back());
    }
    max_ = *std::max_element(panel_max_.begin(), panel_max_.end());
    for (const float value : x) total_ += static_cast<double>(exp_f32(value - max_));
  }

  TruncatedDraw draw(TruncatedSampler& sampler, const SamplingParams& sampling,
                     const std::vector<int32_t>& banned, double u, Isa isa = Isa::kPortable) const {
    return sampler.draw(kernel_table(isa),
                        {.logits = logits_.data(),
                         .V = V_,
                         .scale = scale_,
                         .panel_max = panel_max_,
                         .max = max_,
                         .total = total_},
                        sampling, banned, u);
  }

 private:
  std::vector<float> logits_, panel_max_;
  int64_t V_;
  float scale_, max_ = 0;
  double total_ = 0;
};

// From candidates collected in panels of any order by two threads.
TruncatedDraw draw_listed(TruncatedSampler& sampler, const std::vector<float>& logits, float scale,
                          const SamplingParams& sampling, const std::vector<int32_t>& banned,
                          double u, uint64_t order, Isa isa = Isa::kPortable) {
  CandidateLists lists(kernel_table(isa), 2);
  const std::vector<int32_t> counts = {0, sampling.top_k + static_cast<int32_t>(banned.size())};
  lists.begin(counts);
  Numbers numbers(order);
  const auto V = static_cast<int32_t>(logits.size());
  std::vector<int32_t> panels;
  for (int32_t first = 0; first < V; first += kPanelColumns) panels.push_back(first);
  for (size_t i = panels.size(); i > 1; --i) {
    std::swap(panels[i - 1], panels[static_cast<size_t>(numbers.below(static_cast<int32_t>(i)))]);
  }
  for (const int32_t first : panels) {
    const int32_t columns = std::min(V - first, kPanelColumns);
    std::vector<float> panel(kPanelColumns, 0.0f);
    std::copy_n(logits.begin() + first, columns, panel.begin());
    float max = -std::numeric_limits<float>::infinity();
    for (int32_t c = 0; c < columns; ++c)
      max = std::max(max, panel[static_cast<size_t>(c)] * scale);
    EXPECT_FALSE(lists.may_hold(0, max));
    if (!lists.may_hold(1, max)) continue;
    lists.add(numbers.below(2), 1, panel.data(), columns, scale, first);
  }
  lists.collect(1, sampler.x, sampler.ids);
  return sampler.draw_listed(kernel_table(isa), sampling, banned, u);
}

struct Case {
  std::vector<float> logits;
  SamplingParams sampling;
  std::vector<int32_t> banned;
};

Case random_case(Numbers& numbers) {
  Case c;
  const int32_t V = 1 + numbers.below(300);
  const float step = numbers.below(2) == 0 ? 0.5f : 0.01f;
  for (int32_t i = 0; i < V; ++i) {
    c.logits.push_back(std::round(numbers.uniform(6.0f) / step) * step);
  }
  c.sampling.temperature = 0.3f + std::abs(numbers.uniform(2.0f));
  if (numbers.below(2) == 0) c.sampling.top_k = 1 + numbers.below(V + 5);
  if (numbers.below(2) == 0) c.sampling.top_p = 0.001f + std::abs(numbers.uniform(0.99f));
  if (numbers.below(3) == 0) c.sampling.min_p = std::abs(numbers.uniform(0.9f));
  for (int32_t i = 0; i < V && V > 4; i += 1 + V / 3) {
    if (numbers.below(3) == 0) c.banned.push_back(i);
  }
  return c;
}

// u sweeps the running mass of the support that the definition gives: the middle of each token's
// interval must draw that token, so the supports are the same, token for token.
TEST(Truncation, KeepsTheSupportOfItsDefinition) {
  const FlushSubnormalsScope flush;
  Numbers numbers(1);
  TruncatedSampler sampler;
  for (int round = 0; round < 300; ++round) {
    const Case c = random_case(numbers);
    const float scale = 1.0f / c.sampling.temperature;
    const Row row(c.logits, scale, c.banned);
    const bool is_top_k = is_listed(c.sampling, static_cast<int64_t>(c.logits.size()));
    const std::vector<int32_t> kept = kept_ids(c.logits, scale, c.sampling, c.banned);
    double max = -1e300, total = 0, before = 0;
    for (const int32_t id : kept) {
      max = std::max(max, static_cast<double>(c.logits[static_cast<size_t>(id)] * scale));
    }
    const auto mass_of = [&](int32_t id) {
      return std::exp(static_cast<double>(c.logits[static_cast<size_t>(id)] * scale) - max);
    };
    for (const int32_t id : kept) total += mass_of(id);
    for (const int32_t id : kept) {
      const double mass = mass_of(id);
      const double u = (before + mass / 2) / total;
      before += mass;
      const TruncatedDraw draw = row.draw(sampler, c.sampling, c.banned, u);
      // Tokens of less mass than the rounding of all before them have no middle to aim at.
      if (mass > 1e-5 * total) {
        ASSERT_EQ(draw.token, id) << "round " << round;
      }
      ASSERT_NEAR(draw.kept / total, 1.0, 1e-6) << "round " << round;
      ASSERT_NEAR(draw.max, max, 1e-6);
      ASSERT_EQ(draw.is_whole, kept.size() == c.logits.size());
      if (!is_top_k) continue;
      const TruncatedDraw listed = draw_listed(sampler, c.logits, scale, c.sampling, c.banned, u,
                                               static_cast<uint64_t>(round));
      if (mass > 1e-5 * total) {
        ASSERT_EQ(listed.token, id) << "round " << round;
      }
      ASSERT_NEAR(listed.kept / total, 1.0, 1e-6) << "round " << round;
      ASSERT_EQ(listed.max, draw.max);
    }
  }
}

TEST(Truncation, TiesGoToTheLowerId) {
  const FlushSubnormalsScope flush;
  const std::vector<float> logits = {1, 2, 2, 2, 0};
  TruncatedSampler sampler;
  const Row row(logits, 1.0f, {});
  const auto draw = [&](const SamplingParams& sampling, double u) {
    const int32_t token = row.draw(sampler, sampling, {}, u).token;
    if (is_listed(sampling, 5)) {
      EXPECT_EQ(draw_listed(sampler, logits, 1.0f, sampling, {}, u, 1).token, token);
    }
    return token;
  };
  EXPECT_EQ(draw({.top_k = 1}, 0.999), 1);
  EXPECT_EQ(draw({.top_k = 2}, 0.499), 1);
  EXPECT_EQ(draw({.top_k = 2}, 0.501), 2);
  EXPECT_EQ(draw({.top_k = 2}, 0.999999), 2);
  // The three largest hold 0.84 of the mass: half of it needs two of them.
  EXPECT_EQ(draw({.top_p = 0.5f}, 0.999999), 2);
  EXPECT_EQ(draw({.top_p = 1e-6f}, 0.999999), 1);
  EXPECT_EQ(draw({.min_p = 1.0f}, 0.999999), 3);
  EXPECT_EQ(draw({.min_p = 0.3f}, 0.0), 0);
}

TEST(Truncation, CutsNothingWhereAllIsOff) {
  EXPECT_FALSE(truncates({}, 100));
  EXPECT_FALSE(truncates({.top_k = 100}, 100));
  EXPECT_FALSE(truncates({.top_k = -1}, 100));
  EXPECT_TRUE(truncates({.top_k = 99}, 100));
  EXPECT_TRUE(truncates({.top_p = 0.99f}, 100));
  EXPECT_TRUE(truncates({.min_p = 0.01f}, 100));
}

// Long rows, whose cut is looked for where a sample or the panels' maxima say: flat ones, peaked
// ones, ones whose few large tokens no sample sees, and ones of equal tokens.
std::vector<std::vector<float>> long_rows() {
  constexpr int64_t kV = 40'037;
  std::vector<std::vector<float>> rows;
  rows.push_back(Numbers(21).vector(kV, 1.0f));
  rows.push_back(Numbers(22).vector(kV, 12.0f));
  rows.push_back(std::vector<float>(kV, 0.5f));
  auto few = Numbers(23).vector(kV, 0.5f);
  for (size_t i = 0; i < 700; ++i) few[30'017 + i] += 5.0f;  // 11 panels of the 626
  rows.push_back(few);
  auto misleading = Numbers(25).vector(kV, 1.0f);  // the panels of the sample are all larger
  for (size_t i = 0; i < misleading.size(); ++i) {
    if (i / kPanelColumns % 4 == 0) misleading[i] += 1.5f;
  }
  rows.push_back(misleading);
  auto steps = Numbers(24).vector(kV, 1.0f);
  for (float& value : steps) value = std::round(value * 4.0f) / 4.0f;
  rows.push_back(steps);
  return rows;
}

TEST(Truncation, CutsOfLongRowsAreThoseOfTheWholeOrder) {
  const FlushSubnormalsScope flush;
  TruncatedSampler sampler;
  const std::vector<SamplingParams> kinds = {
      {.top_p = 0.005f}, {.top_p = 0.5f},   {.top_p = 0.9f},
      {.top_p = 0.999f}, {.min_p = 0.4f},   {.top_p = 0.9f, .min_p = 0.3f},
      {.top_k = 1500},   {.top_k = 30'000}, {.top_k = 20'000, .top_p = 0.7f},
      {.top_k = 40},     {.top_k = 1024},   {.top_k = 1000, .top_p = 0.8f},
  };
  const std::vector<int32_t> banned = {3, 64, 30'020, 40'036};
  size_t r = 0;
  for (const std::vector<float>& logits : long_rows()) {
    const Row row(logits, 1.1f, banned);
    for (const SamplingParams& sampling : kinds) {
      const std::vector<int32_t> kept = kept_ids(logits, 1.1f, sampling, banned);
      const auto x = [&](int32_t id) { return logits[static_cast<size_t>(id)] * 1.1f; };
      float max = x(kept[0]), least = x(kept[0]);
      for (const int32_t id : kept) {
        max = std::max(max, x(id));
        least = std::min(least, x(id));
      }
      double total = 0;
      for (const int32_t id : kept) {
        total += std::exp(static_cast<double>(x(id)) - static_cast<double>(max));
      }
      // One token more or less at the boundary is rounding of a sum over up to 40,000.
      const double last = std::exp(static_cast<double>(least) - static_cast<double>(max));
      const std::string what = "row " + std::to_string(r) + ", top_k " +
                               std::to_string(sampling.top_k) + ", top_p " +
                               std::to_string(sampling.top_p);
      const bool is_exact = sampling.top_p >= 1.0f;
      const bool is_short = is_listed(sampling, static_cast<int64_t>(logits.size()));
      const double bound = (is_exact ? 0 : 1.01 * last) + 1e-6 * total;
      // A sanitizer sees a portable draw once: exponentials of a whole row, one call each.
      const std::vector<double> all = {0.37, 0.0, 0.999'999'9};
      for (const double u : std::span(all).first(kIsSanitized ? 1 : all.size())) {
        const TruncatedDraw portable = row.draw(sampler, sampling, banned, u);
        TruncatedDraw reordered;
        if (is_short) reordered = draw_listed(sampler, logits, 1.1f, sampling, banned, u, r + 100);
        for (const Isa isa : supported_isas()) {
          const bool is_again = isa == Isa::kPortable && kIsSanitized;
          const TruncatedDraw draw =
              is_again ? portable : row.draw(sampler, sampling, banned, u, isa);
          ASSERT_NEAR(draw.kept, total, bound) << what;
          ASSERT_TRUE(is_exact ? std::binary_search(kept.begin(), kept.end(), draw.token)
                               : x(draw.token) >= least - 1e-3f)
              << what << ", token " << draw.token;
          ASSERT_EQ(draw.token, portable.token) << what;
          ASSERT_EQ(draw.kept, portable.kept) << what;
          if (!is_short) continue;
          const TruncatedDraw listed =
              draw_listed(sampler, logits, 1.1f, sampling, banned, u, r + 1, isa);
          ASSERT_NEAR(listed.kept, total, bound) << what;
          ASSERT_EQ(listed.token, reordered.token) << what << ": the order of panels shows";
          ASSERT_EQ(listed.kept, reordered.kept) << what << ": the order of panels shows";
        }
      }
    }
    ++r;
  }
}

}  // namespace
}  // namespace rollpack::kernels::cpu
