// Whole steps of a toy model: head layouts of all kinds, pads, groups that sample and are scored.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "toy_model.h"

namespace rollpack::kernels::testing {
namespace {

// Prefills `ids` with the given cuts and scores every token but the first; logprobs by position.
std::vector<uint32_t> score_in_pieces(ToyModel& model, const std::vector<int32_t>& ids,
                                      const std::vector<int32_t>& cuts,
                                      const std::vector<int32_t>& pages) {
  std::vector<uint32_t> bits;
  int32_t begin = 0;
  for (size_t i = 0; i <= cuts.size(); ++i) {
    const auto end = i < cuts.size() ? cuts[i] : static_cast<int32_t>(ids.size());
    StepPlan plan;
    add_rows(plan, {ids.begin() + begin, ids.begin() + end}, begin, pages);
    for (int32_t row = begin; row < end && row + 1 < static_cast<int32_t>(ids.size()); ++row) {
      plan.scores.push_back(
          {.row = row - begin, .token = ids[static_cast<size_t>(row + 1)], .temperature = 0.8f});
    }
    for (const uint32_t word : bits_of(model.run(std::move(plan)).scores)) bits.push_back(word);
    begin = end;
  }
  return bits;
}

class DTypes : public ::testing::TestWithParam<DType> {
 protected:
  static ToyOptions options() {
    ToyOptions result;
    result.shape.dtype = GetParam();
    return result;
  }
};

INSTANTIATE_TEST_SUITE_P(Steps, DTypes, ::testing::Values(DType::kBF16, DType::kF32),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

TEST_P(DTypes, HeadLayoutsOfAllKindsAreCutInvariant) {
  for (const auto& [H, G, K] : {std::array<int64_t, 3>{4, 4, 16}, {7, 1, 2}, {2, 1, 80}}) {
    ToyOptions other = options();
    other.shape.H = H;
    other.shape.G = G;
    other.shape.K = K;
    other.has_qk_norm = true;
    other.window = 21;
    ToyModel model(other);
    const auto ids = random_ids(4, 50, model.shape().V);
    const auto whole = score_in_pieces(model, ids, {}, page_range(0, 4));
    EXPECT_EQ(score_in_pieces(model, ids, {1, 19, 40}, page_range(9, 4)), whole)
        << "H " << H << " G " << G << " K " << K;
  }
}

TEST_P(DTypes, PadRowsChangeNoBitAndCostNoPage) {
  ToyModel model(options());
  const auto ids = random_ids(6, 20, model.shape().V);
  const auto whole = score_in_pieces(model, ids, {}, page_range(0, 2));
  StepPlan plan;
  auto padded = std::vector<int32_t>(13, 5);  // 13 pads on the left
  padded.insert(padded.end(), ids.begin(), ids.end());
  add_rows(plan, padded, -13, page_range(40, 2));
  for (size_t row = 0; row < 13; ++row) plan.positions[row] = kPadPosition;
  add_scores(plan, 13, ids, 19, 0.8f);
  EXPECT_EQ(bits_of(model.run(std::move(plan)).scores), whole);
}

// Group members draw from one prompt row, then each goes on alone, in one batch or on its own.
TEST_P(DTypes, SampledTokensAreScoredToTheirOwnBits) {
  ToyModel model(options());
  const auto prompt = random_ids(7, 37, model.shape().V);
  constexpr int32_t kSiblings = 5, kSteps = 12;
  std::vector<std::vector<int32_t>> sequences(kSiblings, prompt);
  std::vector<std::vector<HeadResult>> sampled(kSiblings);
  for (int32_t step = 0; step < kSteps; ++step) {
    StepPlan plan;
    for (int32_t s = 0; s < kSiblings; ++s) {
      // The first step prefills once; siblings then copy the half-filled page.
      if (step == 0) {
        plan.slot_inits.push_back({.slot = s,
                                   .sampling = {.temperature = 0.8f},
                                   .seed = 3,
                                   .prompt_hash = 99,
                                   .sample_index = static_cast<uint32_t>(s),
                                   .next_position = 37,
                                   .end_position = 37 + kSteps});
        if (s == 0) add_rows(plan, prompt, 0, {0, 1, 2, 3});
        plan.samples.push_back({.row = 36, .slot = s});
        continue;
      }
      const std::vector<int32_t> pages = {0, 1, s == 0 ? 2 : 10 + s, s == 0 ? 3 : 20 + s};
      if (step == 1 && s > 0) {
        plan.page_copies.push_back({.source = 2, .target = 10 + s, .num_tokens = 5});
      }
      add_rows(plan, {kPendingToken}, 36 + step, pages, s);
      plan.samples.push_back({.row = s, .slot = s});
    }
    plan.wants_entropy = true;
    const auto results = model.run(std::move(plan)).samples;
    for (size_t s = 0; s < kSiblings; ++s) {
      EXPECT_EQ(results[s].position, 37 + step);
      EXPECT_EQ(results[s].finish, step + 1 == kSteps ? SlotFinish::kLength : SlotFinish::kRunning);
      sequences[s].push_back(results[s].token);
      sampled[s].push_back(results[s]);
    }
  }
  EXPECT_NE(sequences[0], sequences[1]);  // siblings have their own random streams
  for (size_t s = 0; s < kSiblings; ++s) {
    StepPlan plan;
    add_rows(plan, sequences[s], 0, page_range(50, 4));
    add_scores(plan, 36, {sequences[s].begin() + 36, sequences[s].end()}, kSteps, 0.8f);
    auto scored = model.run(std::move(plan)).scores;
    for (HeadResult& result : sampled[s]) result.finish = SlotFinish::kRunning;
    EXPECT_EQ(bits_of(scored), bits_of(sampled[s])) << "sibling " << s;
  }
}

}  // namespace
}  // namespace rollpack::kernels::testing
