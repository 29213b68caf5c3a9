// What is computed once is not computed again: rows of the simulated backend counted, and the
// tokens cold and warm compared with each sample computed alone.
#include <gtest/gtest.h>

#include <numeric>

#include "tests/rollout/engine/rig.h"

namespace rollpack::rollout {
namespace {

std::vector<int32_t> ascending(int32_t count, int32_t first = 10) {
  std::vector<int32_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

// Runs to the end; returns the rows that took.
int64_t run(Rig& rig, const std::vector<GroupRequest>& groups) {
  const int64_t before = rig.backend->num_rows_run();
  for (const GroupRequest& group : groups) rig.engine.add(group);
  rig.run_to_end();
  for (const GroupRequest& group : groups) {
    expect_alone(rig.collected, group, static_cast<uint64_t>(rig.engine.weight_version()));
  }
  return rig.backend->num_rows_run() - before;
}

TEST(PrefixCache, ComputesOfAKnownPromptItsLastTokenOnly) {
  for (const int32_t num_prompt : {1, 2, 4, 5, 7, 8, 9, 20}) {
    SCOPED_TRACE(num_prompt);
    Rig rig({});
    EXPECT_EQ(run(rig, {group_of(0, ascending(num_prompt))}), num_prompt + 4);
    EXPECT_EQ(rig.engine.state().counters.prefix_cache_queries, num_prompt - 1);
    EXPECT_EQ(rig.engine.state().counters.prefix_cache_hits, 0);
    EXPECT_EQ(run(rig, {group_of(1, ascending(num_prompt))}), 1 + 4);
    EXPECT_EQ(rig.engine.state().counters.prefix_cache_queries, 2 * (num_prompt - 1));
    EXPECT_EQ(rig.engine.state().counters.prefix_cache_hits, num_prompt - 1);
  }
}

TEST(PrefixCache, FindsAnEarlierPromptAndResponseInTheNextTurn) {
  Rig rig({});
  run(rig, {group_of(0, ascending(7), 2, 9)});
  std::vector<int32_t> turn = ascending(7);
  const std::vector<int32_t>& response = rig.collected.samples.at({0, 1}).response_ids;
  turn.insert(turn.end(), response.begin(), response.end());
  for (const int32_t token : {1, 2, 3}) turn.push_back(token);
  // All but the last sampled token has keys; that one and the three new ones are computed.
  EXPECT_EQ(run(rig, {group_of(1, turn)}), 4 + 4);
  EXPECT_EQ(rig.engine.state().counters.prefix_cache_hits, 7 + 9 - 1);
}

TEST(PrefixCache, SharesHalfAPageWithPromptsThatGoOnDifferently) {
  Rig rig({});
  run(rig, {group_of(0, {1, 2, 3, 4, 5, 6, 7})});
  EXPECT_EQ(run(rig, {group_of(1, {1, 2, 3, 4, 5, 6, 9, 9})}), 2 + 4);
  EXPECT_EQ(rig.engine.state().counters.prefix_cache_hits, 6);
  // Neither has written into the other's page.
  EXPECT_EQ(run(rig, {group_of(2, {1, 2, 3, 4, 5, 6, 7}), group_of(3, {1, 2, 3, 4, 5, 6, 9, 9})}),
            2 + 8);
}

TEST(PrefixCache, ComputesACommonBeginningOnceForPromptsThatArriveTogether) {
  Rig rig({.num_pages = 200, .max_num_seqs = 8, .max_num_batched_tokens = 128});
  std::vector<GroupRequest> groups;
  for (int32_t id = 0; id < 8; ++id) {
    std::vector<int32_t> prompt = ascending(16);
    prompt.push_back(id);
    groups.push_back(group_of(id, prompt, 1, 1));
  }
  EXPECT_EQ(run(rig, groups), 16 + 8);
  EXPECT_EQ(rig.engine.state().counters.num_steps, 2) << "one step for the first, one for the rest";
}

TEST(PrefixCache, PrefillsAGroupLargerThanTheSlotsOnce) {
  Rig rig({.num_pages = 200, .max_num_seqs = 4, .max_num_batched_tokens = 64});
  // Four samples fork from the leader. Of each four that come later one computes the prompt's last
  // token, for all of them.
  EXPECT_EQ(run(rig, {group_of(0, ascending(10), 12, 3)}), 10 + 1 + 1 + 12 * 2);
}

TEST(PrefixCache, ScoresSharePromptsButComputeEveryScoredRow) {
  Rig rig({.num_pages = 200, .max_num_batched_tokens = 64});
  std::vector<bridge::ScoreSequence> sequences;
  for (int32_t i = 0; i < 6; ++i) {
    sequences.push_back({.input_ids = ascending(10), .response_ids = {i, 5, 6}});
  }
  for (uint64_t i = 0; i < 6; ++i) {
    rig.engine.add_score({.ticket = i, .sequence = sequences[i]});
  }
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  // Rows 9 to 11 of each score a token; those before are computed once.
  EXPECT_EQ(rig.backend->num_rows_run(), 9 + 6 * 3);
  // The same again: whatever is cached, scored rows need logits of their own.
  for (uint64_t i = 0; i < 6; ++i) {
    rig.engine.add_score({.ticket = 6 + i, .sequence = sequences[i]});
  }
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  EXPECT_EQ(rig.backend->num_rows_run(), 9 + 12 * 3);
  for (uint64_t i = 0; i < 12; ++i) {
    EXPECT_EQ(rig.collected.scored.at(i).logprobs, score_alone(sequences[i % 6], 0));
  }
}

TEST(PrefixCache, ForgetsEverythingWhenWeightsChange) {
  Rig rig({});
  run(rig, {group_of(0, ascending(12))});
  rig.backend->set_version(1);
  rig.engine.switch_version(1);
  EXPECT_EQ(run(rig, {group_of(1, ascending(12))}), 12 + 4);
  EXPECT_EQ(rig.engine.state().counters.prefix_cache_hits, 0);
}

TEST(PrefixCache, OffMeansThatEverySampleComputesItsOwnPrompt) {
  Rig rig({.num_pages = 200, .prefix_sharing = false});
  EXPECT_EQ(run(rig, {group_of(0, ascending(12), 3)}), 3 * (12 + 4));
  EXPECT_EQ(run(rig, {group_of(1, ascending(12), 3)}), 3 * (12 + 4));
  EXPECT_EQ(rig.engine.state().counters.prefix_cache_queries, 0);
  EXPECT_EQ(rig.engine.state().pool.num_free(), 200);
}

TEST(PrefixCache, GivesItsPagesToWhoeverNeedsThem) {
  Rig rig({.num_pages = 12});
  for (int32_t id = 0; id < 20; ++id) {  // each fills the memory: 47 tokens of 48 slots
    EXPECT_EQ(run(rig, {group_of(id, ascending(24, id), 1, 24)}), 24 + 23);
  }
  EXPECT_EQ(rig.engine.state().counters.num_preemptions, 0);
  EXPECT_LE(rig.engine.state().index.num_pages(), 12);
}

// A prompt whose keys are not finite must fail for itself, and nobody may find its pages.
TEST(PrefixCache, HoldsNoPageOfASequenceThatFailed) {
  Rig rig({});
  std::vector<int32_t> bad = ascending(8);
  bad[6] = kVocab;
  rig.engine.add(group_of(0, bad, 4, 1));
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  EXPECT_EQ(rig.collected.failed.size(), 4u);
  EXPECT_TRUE(rig.collected.samples.empty()) << "drawn from what its leader could not compute";
  EXPECT_EQ(rig.engine.state().index.find(0, bad).num_tokens, 0);
}

}  // namespace
}  // namespace rollpack::rollout
