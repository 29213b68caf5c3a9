// When pages run out: who goes, when it comes back, what that costs, and what planning costs.
#include <gtest/gtest.h>

#include <algorithm>
#include <ctime>
#include <map>
#include <string>
#include <utility>

#include "tests/rollout/engine/rig.h"

namespace rollpack::rollout {
namespace {

GroupRequest distinct_group(int64_t request_id, int32_t num_prompt, int32_t response_length,
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
  rig.engine.add(distinct_group(0, 4, 20));
  rig.engine.add(distinct_group(1, 8, 16));
  for (int i = 0; i < 3; ++i) rig.engine.step(1s);
  rig.engine.add(distinct_group(2, 12, 12));  // the youngest, but with the most tokens at once
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
      groups.push_back(distinct_group(id, 8, 100));
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
  for (int32_t id = 0; id < 64; ++id) rig.engine.add(distinct_group(id, 8, 100));
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

// Processor time of one step, the simulated backend's included, which is linear in its rows: the
// machine may have other things to do.
double step_cpu_s(Engine& engine) {
  const auto now_s = [] {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
  };
  const double start_s = now_s();
  EXPECT_EQ(engine.step(1s), Engine::StepOutcome::kDone);
  return now_s() - start_s;
}

// The quickest decoding step of `num_seqs` sequences, with as many again waiting for pages.
double decoding_cpu_s(int32_t num_seqs) {
  Rig rig({.num_pages = num_seqs * 4,
           .max_num_seqs = num_seqs * 2,
           .max_num_batched_tokens = num_seqs * 12});
  for (int32_t id = 0; id < num_seqs * 2; ++id) rig.engine.add(distinct_group(id, 6, 12));
  double best_s = 1e9;
  for (int i = 0; i < 9; ++i) best_s = std::min(best_s, step_cpu_s(rig.engine));
  EXPECT_FALSE(rig.engine.state().waiting.empty());
  return best_s;
}

// The dearest step of `num_seqs` sequences that all start and cannot all go on.
double preempting_cpu_s(int32_t num_seqs) {
  double best_s = 1e9;
  for (int repeat = 0; repeat < 3; ++repeat) {
    Rig rig({.num_pages = num_seqs * 2 + 1,
             .max_num_seqs = num_seqs,
             .max_num_batched_tokens = num_seqs * 4});
    for (int32_t id = 0; id < num_seqs; ++id) rig.engine.add(distinct_group(id, 4, 12));
    double most_s = 0;
    for (int i = 0; i < 6; ++i) most_s = std::max(most_s, step_cpu_s(rig.engine));
    EXPECT_GT(rig.engine.state().counters.num_preemptions, num_seqs / 4);
    best_s = std::min(best_s, most_s);
  }
  return best_s;
}

// Sixteen times the sequences: quadratic cost would show as 256 times the time. Caches and
// logarithms make a row dearer where there are many, by less than half of that.
TEST(Preemption, CostsOfAStepGrowAboutLinearly) {
  struct Kind {
    const char* name;
    double (*cpu_s)(int32_t num_seqs);
  };
  for (const auto& [name, cpu_s] :
       {Kind{"decoding", decoding_cpu_s}, Kind{"preempting", preempting_cpu_s}}) {
    const double few_s = cpu_s(256), many_s = cpu_s(4096);
    RecordProperty(std::string(name) + "_us_of_256", std::to_string(few_s * 1e6));
    RecordProperty(std::string(name) + "_us_of_4096", std::to_string(many_s * 1e6));
    EXPECT_LT(many_s, 16 * 6 * few_s)
        << name << ": " << few_s * 1e6 << " us, then " << many_s * 1e6;
  }
}

}  // namespace
}  // namespace rollpack::rollout
