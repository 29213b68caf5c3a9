// Whole steps of every backend against the reference. Errors of single ops are bounded in their own
// tests; through layers, worst cases multiply to a bound that says nothing, so this one is measured
// by backward error: a computed sum of n products is the exact sum for weights that are each off by
// at most gamma_n (Higham, "Accuracy and Stability of Numerical Algorithms", 3.5), and an input
// stored in bf16 is off by one rounding. The reference, run on weights moved that far, shows how
// far its results then move; a backend must stay within that.
#include <algorithm>

#include "tests/kernels/tiny_model.h"

namespace rollpack::kernels::testing {
namespace {

using TransformerConformance = BackendTest;

constexpr int32_t kRows = 60;
constexpr double kLongestSum = 72;  // products of the longest sum of the model, at least

StepPlan scored_plan() {
  const std::vector<int32_t> ids = Numbers(8).ids(kRows + 1, 1100);
  StepPlan plan;
  add_sequence(plan, {ids.begin(), ids.end() - 1}, 0, page_range(0, 4));
  for (int32_t row = 0; row < kRows; ++row) {
    plan.scores.push_back({row, ids[static_cast<size_t>(row) + 1]});
  }
  return plan;
}

// The largest difference of a logprob or an entropy.
double distance(const std::vector<HeadResult>& a, const std::vector<HeadResult>& b) {
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::abs(static_cast<double>(a[i].logprob) - b[i].logprob));
    largest = std::max(largest, std::abs(static_cast<double>(a[i].entropy) - b[i].entropy));
  }
  return largest;
}

std::vector<HeadResult> scores_of(TinyModel& model) {
  model.rig().commit();
  return model.run(scored_plan()).scores;
}

TEST_P(TransformerConformance, StepsStayWithinTheBackwardErrorOfTheirSums) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    TinyModel reference("reference", dtype), model(GetParam(), dtype);
    reference.set_weights(3);
    model.set_weights(3);
    const auto want = scores_of(reference);
    const double relative = dtype == DType::kBF16 ? 2 * kUnitBF16 : gamma_of(kLongestSum);
    double bound = HUGE_VAL;
    for (const uint64_t signs : {1, 2, 3, 4}) {
      reference.set_weights(3);
      reference.rig().perturb_weights(relative, signs);
      bound = std::min(bound, distance(scores_of(reference), want));
    }
    const double got = distance(scores_of(model), want);
    EXPECT_LE(got, bound) << dtype_name(dtype);
    RecordProperty(std::string(dtype_name(dtype)),
                   std::to_string(got) + " of " + std::to_string(bound));
    model.set_weights(4);  // what the bound is worth: other weights are far beyond it
    EXPECT_GT(distance(scores_of(model), want), 2 * bound) << dtype_name(dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, TransformerConformance, all_backends());

}  // namespace
}  // namespace rollpack::kernels::testing
