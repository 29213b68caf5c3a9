// The next step is planned and submitted while one is under way: what that may cost, what waits for
// the end of the step, and what does not.
#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "kernels/forwarding_backend.h"
#include "tests/rollout/engine/rig.h"

namespace rollpack::rollout {
namespace {

GroupRequest group_with(int32_t num_samples, int32_t response_length,
                        std::vector<int32_t> stops = {},
                        std::vector<int32_t> prompt = {5, 6, 7, 8, 9, 10}) {
  GroupRequest group;
  group.key = {.prompt_id = {.text = "p"}, .group_size = num_samples};
  group.prompt_ids = std::make_shared<const std::vector<int32_t>>(std::move(prompt));
  group.sampling = {
      .seed = 3, .response_length = response_length, .stop_token_ids = std::move(stops)};
  return group;
}

int32_t num_pages_held(const Rig& rig) {
  return rig.engine.state().pool.num_pages() - rig.engine.state().pool.num_available();
}

TEST(PlanningAhead, SubmitsTheNextStepBeforeTheResultsAreThereAndOverrunsNoLength) {
  for (const Timing timing : {Timing::kLate, Timing::kDelayed}) {
    Rig rig({.timing = timing});
    GroupRequest group = group_with(1, 7);
    rig.engine.add(group);
    for (int step = 0; step < 6; ++step) {
      ASSERT_EQ(rig.engine.step(10s), Engine::StepOutcome::kDone);
      EXPECT_EQ(rig.engine.state().num_steps_under_way, 1) << "step " << step;
    }
    ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
    expect_alone(rig.collected, group);
    // The prompt, and a row for every token but the last.
    EXPECT_EQ(rig.backend->num_rows_run(), 6 + 6);
    EXPECT_EQ(counters_of(rig).num_steps, 7);
    EXPECT_EQ(counters_of(rig).num_rows_after_stop, 0);
  }
}

TEST(PlanningAhead, AStopCostsOneRowAndItsPagesComeBackWhenThatRowIsDone) {
  const std::vector<int32_t> text = alone(group_with(1, 12), 0, 0);
  // The last that no token before it equals.
  size_t last = text.size() - 2;
  while (std::ranges::find(text, text[last]) != text.begin() + static_cast<ptrdiff_t>(last)) --last;
  GroupRequest group = group_with(1, 12, {text[last]});
  Rig rig({.prefix_sharing = false, .timing = Timing::kLate});
  rig.engine.add(group);
  while (rig.collected.samples.empty()) {
    ASSERT_EQ(rig.engine.step(1s), Engine::StepOutcome::kDone);
  }
  EXPECT_EQ(rig.engine.state().num_steps_under_way, 1);
  EXPECT_GT(num_pages_held(rig), 0) << "pages of a step under way were given back";
  EXPECT_EQ(rig.engine.num_open(), 0);
  EXPECT_EQ(counters_of(rig).num_rows_after_stop, 0);
  ASSERT_EQ(rig.engine.step(1s), Engine::StepOutcome::kDone);
  EXPECT_EQ(counters_of(rig).num_rows_after_stop, 1);
  EXPECT_FALSE(rig.engine.has_work());
  rig.expect_nothing_held();
  expect_alone(rig.collected, group);
  EXPECT_EQ(rig.backend->num_rows_run(), 6 + static_cast<int64_t>(last) + 1);
}

TEST(PlanningAhead, ANewSequenceMayTakePagesAndSlotOfOneThatStopped) {
  const std::vector<int32_t> text = alone(group_with(1, 12), 0, 0);
  Rig rig({.num_pages = 5, .max_num_seqs = 1, .timing = Timing::kLate, .lateness = 2});
  std::vector<GroupRequest> groups;
  for (int64_t id = 0; id < 8; ++id) {
    groups.push_back(group_with(1, 12, {text[static_cast<size_t>(id)]}));
    groups.back().key.request_id = id;
    rig.engine.add(groups.back());
  }
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  for (const GroupRequest& group : groups) expect_alone(rig.collected, group);
  EXPECT_EQ(counters_of(rig).num_rows_after_stop, 8);
}

TEST(PlanningAhead, SiblingsBeginOneStepAfterTheirPromptAndGiveTheSameTokens) {
  Rig rig({.timing = Timing::kLate});
  GroupRequest group = group_with(6, 9, {3, 50});
  rig.engine.add(group);
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  expect_alone(rig.collected, group);
  EXPECT_EQ(counters_of(rig).num_preemptions, 0);
}

TEST(PlanningAhead, AnAbortWaitsForNothing) {
  Rig rig({.timing = Timing::kLate});
  GroupRequest group = group_with(2, 20);
  rig.engine.add(group);
  for (int step = 0; step < 4; ++step) rig.engine.step(1s);
  ASSERT_EQ(rig.engine.state().num_steps_under_way, 1);
  EXPECT_EQ(rig.engine.abort(std::nullopt), 2);
  EXPECT_EQ(rig.engine.state().num_steps_under_way, 1);
  ASSERT_EQ(rig.collected.samples.size(), 2u);
  for (const auto& [name, sample] : rig.collected.samples) {
    const std::vector<int32_t> whole = alone(group, name.second, 0);
    ASSERT_LT(sample.response_ids.size(), whole.size());
    EXPECT_TRUE(std::ranges::equal(sample.response_ids,
                                   std::span(whole).first(sample.response_ids.size())));
    EXPECT_EQ(sample.logprobs.size(), sample.response_ids.size());
  }
  EXPECT_GT(num_pages_held(rig), 0);
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  EXPECT_EQ(counters_of(rig).num_rows_after_stop, 0) << "an abort is not a stop";
}

TEST(PlanningAhead, WeightsChangeBetweenStepsOnly) {
  Rig rig({.timing = Timing::kDelayed});
  GroupRequest group = group_with(2, 20);
  rig.engine.add(group);
  for (int step = 0; step < 4; ++step) rig.engine.step(10s);
  ASSERT_EQ(rig.engine.state().num_steps_under_way, 1);
  EXPECT_THROW(rig.engine.switch_version(1), std::exception);
  EXPECT_THROW(rig.engine.set_policy(make_batching_policy("continuous")), std::exception);
  ASSERT_TRUE(rig.engine.finish_steps(10s));
  EXPECT_EQ(rig.engine.state().num_steps_under_way, 0);
  rig.backend->set_version(1);
  rig.engine.switch_version(1);
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  for (const auto& [name, sample] : rig.collected.samples) {
    ASSERT_EQ(sample.weight_versions.size(), 2u);
    expect_stamped(sample, group);
  }
}

// Steps never end once it is stuck.
class StuckBackend final : public kernels::ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;
  kernels::StepResult wait(kernels::StepHandle handle, kernels::Deadline deadline) override {
    if (!is_stuck) return inner().wait(handle, deadline);
    throw Error({.code = ErrorCode::kDeadlineExceeded, .field = "step", .message = "stuck"});
  }
  bool is_stuck = false;
};

TEST(PlanningAhead, AnInterruptionGivesUpAllStepsUnderWay) {
  StuckBackend backend(
      std::make_unique<SimulatedBackend>(SimulatedBackend::Options{.max_steps_under_way = 2}));
  Collected collected;
  Engine engine({.max_num_seqs = 8,
                 .max_num_batched_tokens = 32,
                 .page_tokens = 4,
                 .num_pages = 64,
                 .page_bytes = 1,
                 .max_positions = 1000},
                make_batching_policy("continuous"), backend, collected);
  engine.add(group_with(2, 20));
  for (int step = 0; step < 4; ++step) engine.step(1s);
  backend.is_stuck = true;
  EXPECT_EQ(engine.step(10s, [] { return true; }), Engine::StepOutcome::kInterrupted);
  EXPECT_EQ(engine.state().num_steps_under_way, 0);
  EXPECT_EQ(engine.abort(std::nullopt), 2);
  EXPECT_EQ(collected.samples.at({0, 0}).response_ids.size(), 4u);
  EXPECT_EQ(collected.samples.at({0, 1}).response_ids.size(), 3u) << "it begins a step later";
  EXPECT_FALSE(engine.has_work());
  EXPECT_NO_THROW(engine.state().index.check());
}

// A prompt whose keys are NaN in its second chunk, while the third is under way.
TEST(PlanningAhead, NobodyGetsTokensFromKeysThatAreNotFinite) {
  Rig rig({.max_num_batched_tokens = 4, .timing = Timing::kLate});
  std::vector<int32_t> prompt(14, 2);
  prompt[6] = kVocab;
  GroupRequest bad = group_with(3, 5, {}, prompt);
  GroupRequest good = group_with(2, 5);
  good.key.request_id = 1;
  rig.engine.add(bad);
  rig.engine.add(good);
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  expect_alone(rig.collected, good);
  EXPECT_EQ(rig.collected.failed.size(), 3u);
  EXPECT_EQ(rig.collected.samples.size(), 2u);
}

TEST(PlanningAhead, ScoresAreWholeWhenTheirLastChunkIsDone) {
  Rig rig({.max_num_batched_tokens = 3, .timing = Timing::kLate});
  const bridge::ScoreSequence given{.input_ids = {1, 2, 3, 4, 5}, .response_ids = {6, 7, 8, 9, 10}};
  rig.engine.add_score({.ticket = 0, .sequence = given});
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  EXPECT_EQ(rig.collected.scored.at(0).logprobs, score_alone(given, 0));
}

TEST(PlanningAhead, WaitsWhereTokensMustBeKnown) {
  for (const char* batching : {"continuous", "left_padded", "prepacked"}) {
    // Drafts look at all tokens; the other modes are there to compare with.
    Rig rig({.batching = batching, .speculation = Speculation::kOn, .timing = Timing::kLate});
    GroupRequest group = group_with(3, 15, {3, 50});
    rig.engine.add(group);
    while (rig.engine.has_work()) {
      ASSERT_EQ(rig.engine.step(1s), Engine::StepOutcome::kDone);
      EXPECT_EQ(rig.engine.state().num_steps_under_way, 0) << batching;
    }
    expect_alone(rig.collected, group);
  }
}

// Over few tokens drafts are found, and few of them come true.
TEST(PlanningAhead, DraftsThatAreWorthTheirRowsStopItForAStepOnly) {
  Rig rig({.speculation = Speculation::kAuto,
           .vocab_size = 12,
           .num_pages = 400,
           .timing = Timing::kLate});
  GroupRequest group = group_with(1, 600, {}, std::vector<int32_t>(8, 0));
  rig.engine.add(group);
  int num_ahead = 0;
  while (rig.engine.has_work()) {
    ASSERT_EQ(rig.engine.step(1s), Engine::StepOutcome::kDone);
    num_ahead += rig.engine.state().num_steps_under_way;
  }
  rig.expect_nothing_held();
  EXPECT_EQ(rig.collected.samples.at({0, 0}).response_ids.size(), 600u);
  EXPECT_GT(counters_of(rig).num_drafts, 0);
  EXPECT_GT(num_ahead, 0);
}

}  // namespace
}  // namespace rollpack::rollout
