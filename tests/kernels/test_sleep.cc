// Memory that backends give back and take again: steps before and after have the same bits, and
// those in between are refused.
#include "tests/kernels/tiny_model.h"

namespace rollpack::kernels::testing {
namespace {

using Sleep = BackendTest;

constexpr MemoryTags kAll{.weights = true, .kv_cache = true};

StepPlan scored_plan(const TinyModel& model) {
  const std::vector<int32_t> ids = Numbers(1).ids(19, model.V());
  StepPlan plan;
  add_sequence(plan, {ids.begin(), ids.end() - 1}, 0, page_range(3, 2));
  score_all(plan, {ids.begin() + 1, ids.end()});
  return plan;
}

std::string step_error(TinyModel& model, const StepPlan& plan) {
  return error_text([&] { model.run(plan); });
}

TEST_P(Sleep, StepsGiveTheSameBitsAfterLevel1) {
  TinyModel model(GetParam(), DType::kBF16);
  Backend& backend = model.rig().backend();
  const StepPlan plan = scored_plan(model);
  const StepResult want = model.run(plan);
  const uint64_t hash = backend.weights_hash();
  const int64_t held = backend.held_bytes();
  for (int round = 0; round < 2; ++round) {
    backend.sleep(1);
    EXPECT_LE(backend.held_bytes(), held - backend.info().memory.kv_bytes);
    EXPECT_NE(step_error(model, plan).find("wake_up first"), std::string::npos);
    backend.sleep(1);  // sleeps on
    backend.wake_up({.weights = true});
    EXPECT_NE(step_error(model, plan).find("wake_up first"), std::string::npos);
    backend.wake_up({.kv_cache = true});
    backend.wake_up(kAll);  // is awake
    EXPECT_EQ(backend.held_bytes(), held);
    EXPECT_EQ(backend.weights_hash(), hash);
    expect_same_results(model.run(plan).scores, want.scores, "after sleep");
  }
}

TEST_P(Sleep, Level2DropsTheWeightsUntilAWholeSetIsCommitted) {
  TinyModel model(GetParam(), DType::kF32);
  Backend& backend = model.rig().backend();
  const StepPlan plan = scored_plan(model);
  const StepResult want = model.run(plan);
  const uint64_t hash = backend.weights_hash();
  const int64_t held = backend.held_bytes();
  backend.sleep(1);  // level 2 takes what level 1 has kept
  backend.sleep(2);
  EXPECT_LE(backend.held_bytes(),
            held - backend.info().memory.kv_bytes - backend.info().memory.weight_bytes / 2);
  backend.wake_up(kAll);
  EXPECT_EQ(step_error(model, plan), "step: no weights are committed yet");
  backend.begin_staging();
  EXPECT_NE(error_text([&] { backend.copy_committed_to_staged(); }), "");
  backend.discard_weights();
  model.rig().commit();
  EXPECT_EQ(backend.weights_hash(), hash);
  EXPECT_EQ(backend.held_bytes(), held);
  expect_same_results(model.run(plan).scores, want.scores, "after sleep and an update");
}

TEST_P(Sleep, Level2RefusesToDropWeightsUnderAStagedSet) {
  TinyModel model(GetParam(), DType::kF32);
  Backend& backend = model.rig().backend();
  const StepPlan plan = scored_plan(model);
  const StepResult want = model.run(plan);
  backend.begin_staging();
  EXPECT_NE(error_text([&] { backend.sleep(2); }).find("commit or discard the staged set first"),
            std::string::npos);
  backend.discard_weights();
  expect_same_results(model.run(plan).scores, want.scores, "after the refusal");
}

// What no step has written since reads as after the start: padding of keys and values is 0.
TEST_P(Sleep, PagesAreZeroAfterwards) {
  TinyModel model(GetParam(), DType::kBF16), untouched(GetParam(), DType::kBF16);
  Backend& backend = model.rig().backend();
  model.run(scored_plan(model));
  backend.sleep(1);
  backend.wake_up(kAll);
  const auto decode_over_nothing = [](TinyModel& on) {
    StepPlan plan;  // position 16 sees a whole page that nobody has written
    add_sequence(plan, {5}, 16, page_range(3, 2));
    score_all(plan, {7});
    return on.run(std::move(plan)).scores;
  };
  expect_same_results(decode_over_nothing(model), decode_over_nothing(untouched), "zeros");
}

INSTANTIATE_TEST_SUITE_P(Backends, Sleep, all_backends());

}  // namespace
}  // namespace rollpack::kernels::testing
