// Drafts in the step loop: over random schedules every sample is the same with and without them,
// nothing is left held, and drafts stay within their bounds. A vocabulary of three tokens makes
// guesses come true every third time.
#include "rollout/batching/drafting.h"
#include "tests/rollout/engine/rig.h"
#include "tests/sanitized.h"

namespace rollpack::rollout {
namespace {

GroupRequest repetitive_group(std::mt19937& random, int64_t request_id) {
  const auto below = [&](int32_t n) { return static_cast<int32_t>(random() % n); };
  std::vector<int32_t> prompt(1 + below(20));
  for (int32_t& token : prompt) token = below(3);
  GroupRequest group = group_of(request_id, prompt, 1 + below(6), 1 + below(40));
  group.sampling.min_tokens = below(12);
  if (below(3) == 0) group.sampling.stop_token_ids = {2};
  return group;
}

void expect_same(const Collected& got, const Collected& want) {
  ASSERT_EQ(got.samples.size(), want.samples.size());
  for (const auto& [name, sample] : want.samples) {
    const bridge::Sample& other = got.samples.at(name);
    const std::string what =
        "request " + std::to_string(name.first) + ", sample " + std::to_string(name.second);
    EXPECT_EQ(other.response_ids, sample.response_ids) << what;
    EXPECT_EQ(other.logprobs, sample.logprobs) << what;
    EXPECT_EQ(other.finish_reason, sample.finish_reason) << what;
    EXPECT_EQ(other.stop_token_id, sample.stop_token_id) << what;
    EXPECT_EQ(other.weight_versions.size(), sample.weight_versions.size()) << what;
  }
}

constexpr uint32_t kNumDraftSchedules = kIsSanitized ? 100 : 600;

TEST(Drafting, ChangesNoSampleOverRandomSchedules) {
  int64_t num_accepted = 0, num_rejected = 0, num_preemptions = 0;
  for (uint32_t seed = 0; seed < kNumDraftSchedules; ++seed) {
    SCOPED_TRACE(seed);
    Collected want;
    for (const Speculation speculation :
         {Speculation::kOff, Speculation::kOn, Speculation::kAuto}) {
      std::mt19937 random(seed);
      Rig rig({.speculation = speculation,
               .vocab_size = static_cast<int32_t>(2 + random() % 3),
               .num_pages = static_cast<int32_t>(16 + random() % 40),
               .max_num_seqs = static_cast<int32_t>(1 + random() % 9),
               .max_num_batched_tokens = static_cast<int32_t>(1 + random() % 40),
               .num_speculative_tokens = static_cast<int32_t>(1 + random() % 9),
               .prefix_sharing = random() % 4 != 0});
      const int64_t num_groups = 1 + random() % 6;
      for (int64_t id = 0; id < num_groups; ++id) {
        rig.engine.add(repetitive_group(random, id));
        for (int steps = static_cast<int>(random() % 9); steps > 0; --steps) rig.engine.step(1s);
      }
      ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
      if (speculation == Speculation::kOff) {
        EXPECT_EQ(counters_of(rig).num_drafts, 0);
        want = std::move(rig.collected);
        continue;
      }
      expect_same(rig.collected, want);
      num_accepted += counters_of(rig).num_accepted_tokens;
      num_rejected += counters_of(rig).num_draft_tokens - counters_of(rig).num_accepted_tokens;
      num_preemptions += counters_of(rig).num_preemptions;
    }
  }
  EXPECT_GT(num_accepted, 17 * kNumDraftSchedules);
  EXPECT_GT(num_rejected, 17 * kNumDraftSchedules);
  EXPECT_GT(num_preemptions, kNumDraftSchedules / 6);
}

TEST(Drafting, WeightSwitchesAndAbortsBetweenDraftsKeepEverySample) {
  for (uint32_t seed = 0; seed < kNumDraftSchedules / 3; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    Rig rig({.speculation = Speculation::kOn,
             .vocab_size = 3,
             .num_pages = static_cast<int32_t>(20 + random() % 40)});
    Rig plain({.vocab_size = 3, .num_pages = 200});
    std::vector<GroupRequest> groups;
    for (int64_t id = 0; id < 4; ++id) {
      groups.push_back(repetitive_group(random, id));
      rig.engine.add(groups.back());
      plain.engine.add(groups.back());
    }
    for (int steps = static_cast<int>(random() % 15); steps > 0; --steps) rig.engine.step(1s);
    rig.engine.abort(1);
    rig.engine.switch_version(1);  // of the same weights: whatever is computed again must agree
    ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
    ASSERT_NO_FATAL_FAILURE(plain.run_to_end());
    for (const auto& [name, sample] : plain.collected.samples) {
      const bridge::Sample& other = rig.collected.samples.at(name);
      std::vector<int32_t> tokens = sample.response_ids;
      if (other.finish_reason == bridge::FinishReason::kAbort) {
        ASSERT_LE(other.response_ids.size(), tokens.size());
        tokens.resize(other.response_ids.size());
      }
      EXPECT_EQ(other.response_ids, tokens);
    }
  }
}

// What shortening the first of the longest drafts, row by row, leaves.
std::vector<size_t> shortened_one_by_one(std::vector<size_t> lengths, size_t num_rows) {
  for (size_t total = std::accumulate(lengths.begin(), lengths.end(), size_t{0}); total > num_rows;
       --total) {
    --*std::ranges::max_element(lengths);
  }
  return lengths;
}

TEST(Drafting, DraftsAreCutToOneLevelThatFits) {
  std::mt19937 random(1);
  for (int round = 0; round < 2000; ++round) {
    SCOPED_TRACE(round);
    std::vector<Sequence> sequences(1 + random() % 12);
    std::vector<Sequence*> drafting;
    std::vector<size_t> lengths;
    for (Sequence& sequence : sequences) {
      sequence.draft.assign(1 + random() % 9, 5);
      drafting.push_back(&sequence);
      lengths.push_back(sequence.draft.size());
    }
    const auto num_rows = static_cast<int32_t>(1 + random() % 60);
    fit_drafts(drafting, num_rows);
    const std::vector<size_t> want = shortened_one_by_one(lengths, static_cast<size_t>(num_rows));
    for (size_t i = 0; i < sequences.size(); ++i) {
      EXPECT_EQ(sequences[i].draft.size(), want[i]) << "draft " << i << " of " << num_rows;
    }
  }
}

TEST(Drafting, ThousandsOfLongDraftsAreFittedAtOnce) {
  std::vector<Sequence> sequences(4000);
  std::vector<Sequence*> drafting;
  for (Sequence& sequence : sequences) {
    sequence.draft.assign(1000, 5);
    drafting.push_back(&sequence);
  }
  fit_drafts(drafting, 4001);  // one by one this would look at 16,000 million lengths
  for (const Sequence& sequence : sequences) {
    EXPECT_EQ(sequence.draft.size(), &sequence == &sequences.back() ? 2u : 1u);
  }
}

// A prompt that says what will be sampled: every guess comes true, a step yields six tokens.
TEST(Drafting, ALoneSequenceTakesAWholeDraft) {
  for (const Speculation speculation : {Speculation::kOn, Speculation::kAuto}) {
    Rig rig({.speculation = speculation, .vocab_size = 1, .num_pages = 200});
    rig.engine.add(group_of(0, std::vector<int32_t>(8, 0), 1, 601));
    ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
    EXPECT_EQ(counters_of(rig).num_tokens_generated, 601);
    EXPECT_EQ(counters_of(rig).num_steps, 1 + 600 / 6);
    EXPECT_EQ(counters_of(rig).num_accepted_tokens, 500);
    EXPECT_EQ(counters_of(rig).num_draft_tokens, 500);
    EXPECT_EQ(counters_of(rig).num_rows_computed, 8 + 600);
  }
}

TEST(Drafting, AStepOfDraftsNeverExceedsItsRows) {
  for (const int32_t num_samples : {2, 3, 4, 7, 24}) {
    Rig rig({.speculation = Speculation::kAuto,
             .vocab_size = 1,
             .num_pages = 1000,
             .max_num_seqs = 30});
    rig.engine.add(group_of(0, std::vector<int32_t>(8, 0), num_samples, 61));
    int64_t most_rows = 0;
    while (rig.engine.has_work()) {
      const EngineCounters before = counters_of(rig);
      rig.engine.step(1s);
      if (before.num_steps == 0) continue;  // the prompt
      most_rows =
          std::max(most_rows, counters_of(rig).num_rows_computed - before.num_rows_computed);
    }
    EXPECT_EQ(most_rows, std::min(6 * num_samples, kMaxDraftingRows)) << num_samples << " samples";
    EXPECT_EQ(counters_of(rig).num_drafts > 0, num_samples < kMaxDraftingRows)
        << num_samples << " samples";
  }
}

TEST(Drafting, DraftsThatNeverComeTrueSoonCostAlmostNothing) {
  // Pairs of six letters stand everywhere, and letters are drawn at random.
  Rig rig({.speculation = Speculation::kAuto, .vocab_size = 6, .num_pages = 1000});
  GroupRequest group = group_of(0, std::vector<int32_t>(8, 1), 2, 900);
  rig.engine.add(group);
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  Rig always({.speculation = Speculation::kOn, .vocab_size = 6, .num_pages = 1000});
  always.engine.add(group);
  ASSERT_NO_FATAL_FAILURE(always.run_to_end());
  expect_same(rig.collected, always.collected);
  EXPECT_GT(counters_of(always).num_drafts, 1000);
  EXPECT_GT(counters_of(rig).num_drafts, 10) << "it must have tried";
  EXPECT_LT(counters_of(rig).num_drafts, counters_of(always).num_drafts / 2);
}

TEST(Drafting, FinishedSiblingsAreTheDraft) {
  // Greedy siblings say the same; one starts when the other is done.
  Rig rig(
      {.speculation = Speculation::kAuto, .vocab_size = 50, .num_pages = 100, .max_num_seqs = 1});
  GroupRequest group = group_of(0, {1, 2, 3, 4, 5}, 2, 61);
  rig.backend->ignore_sample_index();
  rig.engine.add(group);
  ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
  EXPECT_EQ(rig.collected.samples.at({0, 0}).response_ids,
            rig.collected.samples.at({0, 1}).response_ids);
  EXPECT_GT(counters_of(rig).num_accepted_tokens, 40);
}

TEST(Drafting, TakesNoPageThatIsNotFreeAndPreemptsNobody) {
  // 8 + 20 tokens: 7 pages of 4, and nothing is left for a draft at the end of each page.
  for (const int32_t num_pages : {7, 8}) {
    Rig rig({.speculation = Speculation::kOn, .vocab_size = 1, .num_pages = num_pages});
    rig.engine.add(group_of(0, std::vector<int32_t>(8, 0), 1, 20));
    ASSERT_NO_FATAL_FAILURE(rig.run_to_end());
    EXPECT_EQ(counters_of(rig).num_preemptions, 0);
    EXPECT_GT(counters_of(rig).num_accepted_tokens, 0);
  }
}

}  // namespace
}  // namespace rollpack::rollout
