// The engine and both batching policies over hundreds of random schedules, against each sample
// computed alone: arrivals, aborts, preemption, weight switches, scoring, budgets of any size.
#include "rollout/engine/engine.h"

#include <gtest/gtest.h>

#include <array>
#include <random>

#include "tests/rollout/engine/rig.h"
#include "tests/sanitized.h"

namespace rollpack::rollout {
namespace {

constexpr uint32_t kNumSchedules = kIsSanitized ? 120 : 600;
constexpr std::array kPolicies = {"continuous", "left_padded", "continuous",
                                  "prepacked",  "continuous",  "length_sorted"};

TEST(Engine, GivesEverySampleAsIfAloneOverRandomSchedules) {
  for (uint32_t seed = 0; seed < kNumSchedules; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const RigOptions options{.batching = kPolicies[seed % kPolicies.size()],
                             .num_pages = static_cast<int32_t>(11 + random() % 40),
                             .max_num_seqs = static_cast<int32_t>(1 + random() % 9),
                             .max_num_batched_tokens = static_cast<int32_t>(1 + random() % 40),
                             .prefix_sharing = random() % 4 != 0};
    Rig rig(options);
    std::vector<GroupRequest> groups;
    const int64_t num_groups = 1 + random() % 8;
    for (int64_t id = 0; id < num_groups; ++id) {
      groups.push_back(random_group(random, id));
      ASSERT_FALSE(check_group(groups.back(), rig.engine.state().limits, ""));
      rig.engine.add(groups.back());
      for (int steps = static_cast<int>(random() % 6); steps > 0; --steps) rig.engine.step(1s);
    }
    ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
    for (const GroupRequest& group : groups) expect_alone(rig.collected, group);
  }
}

TEST(Engine, PrefillsAGroupsPromptOnceAndComputesNoPad) {
  Rig rig({.max_num_batched_tokens = 64});
  std::mt19937 random(1);
  GroupRequest group = random_group(random, 0);
  group.key.group_size = 8;
  group.sampling = {.response_length = 5};
  rig.engine.add(group);
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  // The last sampled token of a sample is never fed back.
  EXPECT_EQ(rig.backend->num_rows_run(), static_cast<int64_t>(group.prompt_ids->size()) + 8 * 4);
}

TEST(Engine, LeftPaddedComputesEveryColumnOfEveryRow) {
  Rig rig({.batching = "left_padded", .max_num_batched_tokens = 64});
  for (int64_t id = 0; id < 2; ++id) {
    GroupRequest group;
    group.key = {.request_id = id, .prompt_id = {.text = std::to_string(id)}, .group_size = 2};
    group.prompt_ids = std::make_shared<const std::vector<int32_t>>(id == 0 ? 3 : 10, 9);
    group.sampling = {.response_length = id == 0 ? 2 : 6};
    rig.engine.add(group);
  }
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  EXPECT_EQ(rig.backend->num_rows_run(), 4 * (10 + 5));
  EXPECT_EQ(rig.engine.state().counters.num_pad_rows, 2 * 7 + 2 * 4);
}

GroupRequest plain_group(int64_t id, int32_t num_prompt, int32_t num_response) {
  GroupRequest group;
  group.key = {.request_id = id, .prompt_id = {.text = std::to_string(id)}, .group_size = 1};
  group.prompt_ids = std::make_shared<const std::vector<int32_t>>(num_prompt, 9);
  group.sampling = {.response_length = num_response};
  return group;
}

TEST(Engine, PrepackedComputesPackedRowsThenLiveRows) {
  for (const int32_t budget : {64, 7, 2}) {
    Rig rig({.batching = "prepacked", .max_num_seqs = 4, .max_num_batched_tokens = budget});
    // Two rows of 10 columns hold 10 | 6 + 3; the last wave's single prompt fills its row.
    const std::vector<std::pair<int32_t, int32_t>> lengths = {{6, 3}, {10, 1}, {3, 5}, {8, 2}};
    const bool is_one_wave = budget >= 3;
    for (size_t i = 0; i < lengths.size() - is_one_wave; ++i) {
      rig.engine.add(plain_group(static_cast<int64_t>(i), lengths[i].first, lengths[i].second));
    }
    ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
    const int64_t expected = is_one_wave ? 2 * 10 + (2 + 0 + 4)     // decoding: no finished row
                                         : 10 * 2 + 2 + 8 * 2 + 5;  // {6, 10}, then {3, 8}
    EXPECT_EQ(rig.backend->num_rows_run(), expected) << "budget " << budget;
  }
}

TEST(Engine, LengthSortedPutsLikeLengthsInOneWaveAndLetsNoneStarve) {
  Rig rig({.batching = "length_sorted", .max_num_seqs = 2});
  for (int64_t id = 0; id < 4; ++id) rig.engine.add(plain_group(id, id % 2 == 0 ? 12 : 3, 1));
  rig.engine.step(1s);  // the two short ones
  // Shorter prompts that come later do not overtake those already sorted.
  for (int64_t id = 4; id < 8; ++id) rig.engine.add(plain_group(id, 1, 1));
  EXPECT_EQ(rig.backend->num_rows_run(), 2 * 3);
  rig.engine.step(1s);
  EXPECT_EQ(rig.backend->num_rows_run(), 2 * 3 + 2 * 12);
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  EXPECT_EQ(rig.engine.state().counters.num_pad_rows, 0);
}

TEST(Engine, LeftPaddedCacheIsOneRectangleOfConsecutivePages) {
  Rig rig({.batching = "left_padded", .num_pages = 40, .max_num_seqs = 3});
  for (int64_t id = 0; id < 7; ++id) {
    const auto length = static_cast<int32_t>(2 + 3 * id);
    rig.engine.add(plain_group(id, length, static_cast<int32_t>(1 + id % 4)));
  }
  while (rig.engine.has_work()) {
    rig.engine.step(1s);
    int32_t previous = -1;
    for (const auto& sequence : rig.engine.state().running) {
      for (const int32_t page : sequence->pages) EXPECT_EQ(page, ++previous);
      EXPECT_EQ(sequence->pages.size(), rig.engine.state().running.front()->pages.size());
    }
  }
  rig.expect_nothing_held();
}

TEST(Engine, PreemptsWhenPagesRunOutAndStillGivesTheSameTokens) {
  Rig rig({.num_pages = 12, .max_num_seqs = 8});
  std::mt19937 random(2);
  std::vector<GroupRequest> groups;
  for (int64_t id = 0; id < 6; ++id) {
    groups.push_back(random_group(random, id));
    groups.back().sampling.stop_token_ids.clear();
    groups.back().sampling.response_length = 24;
    rig.engine.add(groups.back());
  }
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  EXPECT_GT(rig.engine.state().counters.num_preemptions, 0);
  for (const auto& [name, sample] : rig.collected.samples)
    EXPECT_EQ(sample.response_ids.size(), 24u);
}

TEST(Engine, AbortHandsOutPartialSamplesAndHoldsNothing) {
  for (uint32_t seed = 0; seed < kNumSchedules / 2; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    Rig rig({.batching = kPolicies[seed % kPolicies.size()],
             .num_pages = static_cast<int32_t>(11 + random() % 20),
             .max_num_seqs = static_cast<int32_t>(1 + random() % 9)});
    std::vector<GroupRequest> groups;
    for (int64_t id = 0; id < 5; ++id) {
      groups.push_back(random_group(random, id));
      rig.engine.add(groups.back());
    }
    for (int steps = static_cast<int>(random() % 12); steps > 0; --steps) rig.engine.step(1s);
    const int64_t aborted = static_cast<int64_t>(random() % 5);
    rig.engine.abort(aborted);
    ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
    for (const GroupRequest& group : groups) {
      if (group.key.request_id != aborted) {
        expect_alone(rig.collected, group);
        continue;
      }
      for (int32_t i = 0; i < group.key.group_size; ++i) {
        const bridge::Sample& sample = rig.collected.samples.at({aborted, i});
        std::vector<int32_t> whole = alone(group, i, 0);
        ASSERT_LE(sample.response_ids.size(), whole.size());
        whole.resize(sample.response_ids.size());
        EXPECT_EQ(sample.response_ids, whole) << "a partial sample is a prefix";
        EXPECT_EQ(sample.logprobs.size(), whole.size());
      }
    }
  }
}

TEST(Engine, ResumedPromptPlusPartialResponseContinuesTheStream) {
  std::mt19937 random(5);
  GroupRequest group = random_group(random, 0);
  group.key.group_size = 1;
  group.sampling = {.seed = 3, .response_length = 20};
  const std::vector<int32_t> whole = alone(group, 0, 0);
  GroupRequest resumed = group;
  std::vector<int32_t> prompt = *group.prompt_ids;
  prompt.insert(prompt.end(), whole.begin(), whole.begin() + 7);
  resumed.prompt_ids = std::make_shared<const std::vector<int32_t>>(prompt);
  resumed.sampling.response_length = 13;
  Rig rig({});
  rig.engine.add(resumed);
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  EXPECT_EQ(rig.collected.samples.at({0, 0}).response_ids,
            std::vector<int32_t>(whole.begin() + 7, whole.end()));
}

// After a switch each token is drawn from its whole prefix under the version stamped on it.
TEST(Engine, KeepsSamplesOverAWeightSwitchAndStampsTheirVersions) {
  for (uint32_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    Rig rig({.batching = kPolicies[seed % kPolicies.size()],
             .num_pages = static_cast<int32_t>(14 + random() % 30)});
    std::vector<GroupRequest> groups;
    for (int64_t id = 0; id < 4; ++id) {
      groups.push_back(random_group(random, id));
      groups.back().sampling.stop_token_ids.clear();
      rig.engine.add(groups.back());
    }
    for (int steps = static_cast<int>(random() % 15); steps > 0; --steps) rig.engine.step(1s);
    rig.backend->set_version(1);
    rig.engine.switch_version(1);
    ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
    for (const GroupRequest& group : groups) {
      for (int32_t i = 0; i < group.key.group_size; ++i) {
        const bridge::Sample& sample = rig.collected.samples.at({group.key.request_id, i});
        ASSERT_FALSE(sample.weight_versions.empty());
        ASSERT_NO_FATAL_FAILURE(expect_stamped(sample, group));
      }
    }
  }
}

TEST(Engine, ChangesItsPolicyUnderLiveSamplesWithoutChangingThem) {
  for (uint32_t seed = 0; seed < 100; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    Rig rig({.batching = kPolicies[seed % kPolicies.size()]});
    std::vector<GroupRequest> groups;
    for (int64_t id = 0; id < 5; ++id) {
      groups.push_back(random_group(random, id));
      rig.engine.add(groups.back());
    }
    for (int change = 0; change < 3; ++change) {
      for (int steps = static_cast<int>(random() % 8); steps > 0; --steps) rig.engine.step(1s);
      rig.engine.set_policy(make_batching_policy(kPolicies[random() % kPolicies.size()]));
    }
    ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
    for (const GroupRequest& group : groups) expect_alone(rig.collected, group);
  }
}

TEST(Engine, ScoresGivenResponsesWithTheNumbersOfGeneration) {
  for (const char* batching : {"continuous", "left_padded", "prepacked", "length_sorted"}) {
    for (const int32_t budget : {1, 3, 32}) {
      std::mt19937 random(11);
      Rig rig({.batching = batching, .num_pages = 24, .max_num_batched_tokens = budget});
      std::vector<GroupRequest> groups;
      for (int64_t id = 0; id < 5; ++id) {
        groups.push_back(random_group(random, id));
        rig.engine.add(groups.back());
      }
      ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
      uint64_t ticket = 0;
      for (const auto& [name, sample] : rig.collected.samples) {
        rig.engine.add_score(
            {.ticket = ticket++,
             .sequence = {.input_ids = *sample.prompt_ids, .response_ids = sample.response_ids}});
      }
      ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
      ticket = 0;
      for (const auto& [name, sample] : rig.collected.samples) {
        EXPECT_EQ(rig.collected.scored.at(ticket++).logprobs, sample.logprobs);
      }
    }
  }
}

TEST(Engine, ScoresAnEmptyResponseAsNothing) {
  Rig rig({});
  rig.engine.add_score({.ticket = 4, .sequence = {.input_ids = {1}}});
  EXPECT_TRUE(rig.collected.scored.at(4).logprobs.empty());
  EXPECT_FALSE(rig.engine.has_work());
}

TEST(Engine, EndsASequenceAtTheModelsLastPositionByLength) {
  Rig rig({.num_pages = 300});
  std::mt19937 random(3);
  GroupRequest group = random_group(random, 0);
  group.key.group_size = 1;
  group.prompt_ids = std::make_shared<const std::vector<int32_t>>(995, 1);
  group.sampling = {.response_length = 50};
  rig.engine.add(group);
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  const bridge::Sample& sample = rig.collected.samples.at({0, 0});
  EXPECT_EQ(sample.response_ids.size(), 5u);
  EXPECT_EQ(sample.finish_reason, bridge::FinishReason::kLength);
}

TEST(Engine, StopsAdmittingButFinishesWhatHasStarted) {
  Rig rig({.max_num_seqs = 2});
  std::mt19937 random(4);
  for (int64_t id = 0; id < 4; ++id) rig.engine.add(random_group(random, id));
  for (int i = 0; i < 3; ++i) rig.engine.step(1s);
  rig.engine.set_admits(false);
  for (int steps = 0; rig.engine.has_started_work(); ++steps) {
    ASSERT_LT(steps, 1000);
    rig.engine.step(1s);
  }
  EXPECT_TRUE(rig.engine.has_work());
  EXPECT_EQ(rig.engine.step(1s), Engine::StepOutcome::kNothingToDo);
  rig.engine.set_admits(true);
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
}

TEST(RequestCheck, NamesTheBytesASequenceNeeds) {
  const EngineLimits limits{
      .page_tokens = 4, .num_pages = 5, .page_bytes = 100, .max_positions = 1000};
  GroupRequest group;
  group.prompt_ids = std::make_shared<const std::vector<int32_t>>(10, 1);
  group.sampling = {.response_length = 10};
  EXPECT_FALSE(check_group(group, limits, "here"));
  group.sampling.response_length = 11;
  const bridge::Outcome error = check_group(group, limits, "here");
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code, ErrorCode::kResourceExhausted);
  EXPECT_EQ(format_error(*error),
            "engine.kv_cache_memory = 500 bytes (here): expected at least 600 bytes for this "
            "sequence of up to 21 tokens; raise engine.kv_cache_memory or shorten prompt or "
            "response");
}

}  // namespace
}  // namespace rollpack::rollout
