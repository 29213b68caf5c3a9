// An engine whose backend's memory is given back in the middle of its work.
#include "tests/rollout/engine/rig.h"

namespace rollpack::rollout {
namespace {

constexpr kernels::MemoryTags kAll{.weights = true, .kv_cache = true};

// Ten groups of which some have tokens, some wait.
std::vector<GroupRequest> begin_groups(Rig& rig) {
  std::mt19937 random(4);
  std::vector<GroupRequest> groups;
  for (int64_t request = 0; request < 10; ++request) {
    groups.push_back(random_group(random, request));
    rig.engine.add(groups.back());
  }
  for (int step = 0; step < 6; ++step) rig.engine.step(1s);
  rig.engine.finish_steps(1s);
  EXPECT_TRUE(rig.engine.has_started_work());
  return groups;
}

class SleepingEngine : public ::testing::TestWithParam<std::tuple<const char*, Timing>> {
 protected:
  RigOptions options() const {
    return {.batching = std::get<0>(GetParam()), .timing = std::get<1>(GetParam())};
  }
};

TEST_P(SleepingEngine, KeptSamplesGoOnWithTheTokensOfAnUndisturbedOne) {
  Rig rig(options());
  const std::vector<GroupRequest> groups = begin_groups(rig);
  const size_t num_ended = rig.collected.samples.size();
  rig.engine.sleep(1);
  EXPECT_FALSE(rig.engine.is_awake());
  EXPECT_EQ(rig.engine.state().pool.num_free(), rig.engine.state().pool.num_pages());
  EXPECT_EQ(rig.engine.step(1s), Engine::StepOutcome::kNothingToDo);
  EXPECT_EQ(rig.collected.samples.size(), num_ended);
  std::mt19937 random(5);
  const GroupRequest late = random_group(random, 99);
  rig.engine.add(late);  // waits
  rig.engine.wake_up(kAll);
  rig.run_to_end();
  for (const GroupRequest& group : groups) expect_alone(rig.collected, group);
  expect_alone(rig.collected, late);
}

TEST_P(SleepingEngine, AfterLevel2ItWaitsForWeightsAndStampsTheirVersion) {
  Rig rig(options());
  const std::vector<GroupRequest> groups = begin_groups(rig);
  rig.engine.sleep(2);
  rig.engine.wake_up(kAll);
  EXPECT_FALSE(rig.engine.is_awake());
  EXPECT_EQ(rig.engine.step(1s), Engine::StepOutcome::kNothingToDo);
  rig.backend->commit_weights();
  rig.backend->set_version(3);
  rig.engine.switch_version(3);
  rig.run_to_end();
  int num_spanning = 0;
  for (const auto& [name, sample] : rig.collected.samples) {
    expect_stamped(sample, groups[static_cast<size_t>(name.first)]);
    num_spanning += sample.weight_versions.size() == 2;
  }
  EXPECT_GT(num_spanning, 0);
}

TEST_P(SleepingEngine, HandsBackWhatIsAbortedWhileItSleeps) {
  Rig rig(options());
  const std::vector<GroupRequest> groups = begin_groups(rig);
  rig.engine.sleep(1);
  EXPECT_GT(rig.engine.abort(std::nullopt), 0);
  EXPECT_FALSE(rig.engine.has_work());
  for (const GroupRequest& group : groups) {
    for (int32_t i = 0; i < group.key.group_size; ++i) {
      expect_stamped(rig.collected.samples.at({group.key.request_id, i}), group);
    }
  }
  rig.engine.wake_up(kAll);
  rig.expect_nothing_held();
}

INSTANTIATE_TEST_SUITE_P(Modes, SleepingEngine,
                         ::testing::Values(std::tuple("continuous", Timing::kAtOnce),
                                           std::tuple("continuous", Timing::kLate),
                                           std::tuple("prepacked", Timing::kAtOnce),
                                           std::tuple("left_padded", Timing::kAtOnce)));

}  // namespace
}  // namespace rollpack::rollout
