// When pages run out: who goes, when it comes back, what that costs, and what planning costs.
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/rollout/engine/rig.h"

namespace rollpack::rollout {
namespace {

GroupRequest group_of(int64_t request_id, int32_t num_prompt, int32_t response_length,
                      int32_t num_samples = 1) {
  GroupRequest group;
  group.key = {.request_id = request_id,
               .prompt_id = {.text = std::to_string(request_id)},
               .group_size = num_samples};
  std::vector<int32_t> prompt(num_prompt);
  for (int32_t i = 0; i < num_prompt; ++i) {
    // Digits of the request: no two begin alike.
    prompt[i] = static_cast<int32_t>((i == 0 ? request_id : request_id / kVocab + i) % kVocab);
  }
  group.prompt_ids = std::make_shared<const std::vector<int32_t>>(std::move(prompt));
  group.sampling = {.seed = 7, .response_length = response_length};
  return group;
}

TEST(Preemption, TakesTheFewestPrivateTokensAndSparesTheOldest) {
  // Sequences of 24 tokens in the end, 6 pages; 12 pages for three of them.
  Rig rig({.num_pages = 12});
  rig.engine.add(group_of(0, 4, 20));
  rig.engine.add(group_of(1, 8, 16));
  for (int i = 0; i < 3; ++i) rig.engine.step(1s);
  rig.engine.add(group_of(2, 12, 12));  // the youngest, but with the most tokens at once
  std::vector<uint64_t> preempted;
  for (int steps = 0; rig.engine.has_work(); ++steps) {
    ASSERT_LT(steps, 200);
    const int64_t before = rig.engine.state().counters.num_preemptions;
    rig.engine.step(1s);
    if (rig.engine.state().counters.num_preemptions > before) {
      preempted.push_back(rig.engine.state().waiting.begin()->first);
    }
  }
  // The first has 8 or 9 tokens by then, but is the oldest; the second has fewer than the third.
  EXPECT_EQ(preempted, std::vector<uint64_t>{1});
}

TEST(Preemption, RecomputesAtMostTwiceWhatIsMade) {
  for (const int32_t num_pages : {30, 45, 90, 200}) {
    SCOPED_TRACE(num_pages);
    Rig rig({.num_pages = num_pages, .max_num_seqs = 32, .max_num_batched_tokens = 64});
    // 64 sequences of 108 tokens, 27 pages; many start within any of these memories.
    std::vector<GroupRequest> groups;
    for (int32_t id = 0; id < 64; ++id) {
      groups.push_back(group_of(id, 8, 100));
      rig.engine.add(groups.back());
    }
    std::map<uint64_t, int32_t> length_at_last;  // by arrival: when it was preempted last
    while (rig.engine.has_work()) {
      rig.engine.step(1s);
      for (const auto& [arrival, sequence] : rig.engine.state().waiting) {
        if (!sequence->was_preempted) continue;
        int32_t& last = length_at_last[arrival];
        if (last == sequence->length()) continue;  // waiting since
        EXPECT_GE(sequence->length(), 2 * last) << "preempted within what was promised to it";
        last = sequence->length();
      }
    }
    rig.expect_nothing_held();
    for (const GroupRequest& group : groups) expect_alone(rig.collected, group);
    const EngineCounters& counters = rig.engine.state().counters;
    EXPECT_GT(counters.num_preemptions, 0);
    EXPECT_EQ(counters.num_rows_computed,
              64 * (8 + 100 - 1) - counters.prefix_cache_hits + counters.num_tokens_recomputed)
        << "every row is new or counted as recomputed";
    EXPECT_LE(counters.num_tokens_recomputed, 2 * 64 * 108);
  }
}

TEST(Preemption, FindsWhatIsLeftOfItsPagesWhenItComesBack) {
  Rig rig({.num_pages = 45, .max_num_seqs = 32, .max_num_batched_tokens = 64});
  for (int32_t id = 0; id < 64; ++id) rig.engine.add(group_of(id, 8, 100));
  int64_t num_lost = 0;
  std::vector<uint64_t> known;
  while (rig.engine.has_work()) {
    rig.engine.step(1s);
    std::vector<uint64_t> now;
    for (const auto& [arrival, sequence] : rig.engine.state().waiting) {
      if (!sequence->was_preempted) break;  // younger ones have not started
      now.push_back(arrival);
      if (!std::ranges::binary_search(known, arrival)) num_lost += sequence->num_lost;
    }
    known = now;
  }
  EXPECT_GT(num_lost, 0);
  EXPECT_LT(rig.engine.state().counters.num_tokens_recomputed, num_lost);
}

// Scheduling time a row of the quickest step in the middle of `num_seqs` sequences' lives, with as
// many again waiting for pages.
double scheduling_s_per_row(int32_t num_seqs) {
  Rig rig({.num_pages = num_seqs * 4,
           .max_num_seqs = num_seqs * 2,
           .max_num_batched_tokens = num_seqs * 12});
  for (int32_t id = 0; id < num_seqs * 2; ++id) rig.engine.add(group_of(id, 6, 12));
  double best = 1e9;
  for (int i = 0; i < 9; ++i) {
    const EngineCounters before = rig.engine.state().counters;
    rig.engine.step(1s);
    const EngineCounters& after = rig.engine.state().counters;
    best =
        std::min(best, (after.scheduling_s - before.scheduling_s) /
                           static_cast<double>(after.num_rows_computed - before.num_rows_computed));
  }
  EXPECT_FALSE(rig.engine.state().waiting.empty());
  return best;
}

// Sixteen times the sequences: quadratic cost would show as sixteen times the cost a row. Caches
// make a row dearer where there are many, by less than this.
TEST(Preemption, PlanningAStepCostsAboutLinearTime) {
  const double few = scheduling_s_per_row(256);
  const double many = scheduling_s_per_row(4096);
  RecordProperty("ns_per_row_of_256", std::to_string(few * 1e9));
  RecordProperty("ns_per_row_of_4096", std::to_string(many * 1e9));
  EXPECT_LT(many, 8 * few) << few * 1e9 << " ns a row, then " << many * 1e9;
}

// Half of all sequences preempted in one step.
TEST(Preemption, OfThousandsAtOnceCostsAboutLinearTime) {
  const auto worst_step_s = [](int32_t num_seqs) {
    double worst = 1e9;
    for (int repeat = 0; repeat < 3; ++repeat) {
      Rig rig({.num_pages = num_seqs * 2 + 1,
               .max_num_seqs = num_seqs,
               .max_num_batched_tokens = num_seqs * 4});
      for (int32_t id = 0; id < num_seqs; ++id) rig.engine.add(group_of(id, 4, 12));
      double most = 0;
      for (int i = 0; i < 6; ++i) {
        const EngineCounters before = rig.engine.state().counters;
        rig.engine.step(1s);
        most = std::max(most, rig.engine.state().counters.scheduling_s - before.scheduling_s);
      }
      EXPECT_GT(rig.engine.state().counters.num_preemptions, num_seqs / 4);
      worst = std::min(worst, most);
    }
    return worst;
  };
  const double few = worst_step_s(256), many = worst_step_s(4096);
  RecordProperty("us_of_256", std::to_string(few * 1e6));
  RecordProperty("us_of_4096", std::to_string(many * 1e6));
  EXPECT_LT(many, 16 * 8 * few) << few * 1e6 << " us, then " << many * 1e6;
}

}  // namespace
}  // namespace rollpack::rollout
