// A thousand random lives of an engine: prompts that share beginnings, arrivals, aborts,
// preemption, weight switches, pauses, scores, prompts whose keys are NaN; the books checked after
// every step, every result against the sample computed alone; at once, and with the next step
// planned while one is under way. ROLLPACK_FULL=1 runs 20,000, sanitizers a fifth of either, and
// ROLLPACK_SCHEDULES any other number.
#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <random>
#include <string>

#include "rollout/batching/page_needs.h"
#include "tests/rollout/engine/rig.h"
#include "tests/sanitized.h"

namespace rollpack::rollout {
namespace {

constexpr int32_t kMaxPrompt = 20, kMaxResponse = 24;  // 11 pages of 4 hold any sequence
constexpr int32_t kNan = kVocab;                       // a token whose keys are NaN

uint32_t num_schedules() {
  if (const char* count = std::getenv("ROLLPACK_SCHEDULES")) return std::stoul(count);
  const char* full = std::getenv("ROLLPACK_FULL");
  const uint32_t count = full != nullptr && std::string(full) == "1" ? 20000 : 1000;
  return kIsSanitized ? count / 5 : count;
}

class Schedule {
 public:
  Schedule(uint32_t seed, Timing timing)
      : random_(seed),
        options_(random_options(timing, seed)),
        rig_(options_),
        num_left_(4 + below(12)) {
    for (std::vector<int32_t>& text : texts_) {
      text.resize(kMaxPrompt);
      for (int32_t& token : text) token = below(kVocab);
    }
  }

  void run() {
    while (num_left_ > 0 || rig_.engine.has_work()) {
      disturb();
      if (num_left_ == 0) set_admits(true);
      ASSERT_NO_FATAL_FAILURE(step());
    }
    rig_.expect_nothing_held();
    ASSERT_NO_FATAL_FAILURE(expect_all_right());
  }

  const EngineCounters& counters() const { return rig_.engine.state().counters; }
  int64_t num_stopped() const {
    return std::ranges::count_if(rig_.collected.samples, [](const auto& named) {
      return named.second.finish_reason == bridge::FinishReason::kStop;
    });
  }

 private:
  int32_t below(int32_t n) { return static_cast<int32_t>(random_() % n); }

  RigOptions random_options(Timing timing, uint32_t seed) {
    return {.batching = below(8) == 0 ? "left_padded" : "continuous",
            .num_pages = 11 + below(40),
            .max_num_seqs = 1 + below(9),
            .max_num_batched_tokens = 1 + below(40),
            .chunked_prefill = below(4) != 0,
            .prefix_sharing = below(6) != 0,
            .timing = timing,
            .lateness = seed};
  }

  // A new text, the beginning of one that others begin with too, or an earlier conversation.
  std::vector<int32_t> random_prompt() {
    std::vector<int32_t> prompt;
    if (const int32_t kind = below(4); kind == 0 && !rig_.collected.samples.empty()) {
      auto sample = rig_.collected.samples.begin();
      std::advance(sample, below(static_cast<int32_t>(rig_.collected.samples.size())));
      prompt = *sample->second.prompt_ids;
      const std::vector<int32_t>& response = sample->second.response_ids;
      prompt.insert(prompt.end(), response.begin(), response.end());
    } else if (kind != 1) {
      prompt = texts_[below(static_cast<int32_t>(texts_.size()))];
      prompt.resize(1 + below(kMaxPrompt));
    }
    for (int32_t count = below(6); count > 0 || prompt.empty(); --count) {
      prompt.push_back(below(kVocab));
    }
    const int32_t max_length = options_.chunked_prefill
                                   ? kMaxPrompt
                                   : std::min(kMaxPrompt, options_.max_num_batched_tokens);
    if (prompt.size() > static_cast<size_t>(max_length)) prompt.resize(max_length);
    if (below(16) == 0) prompt[below(static_cast<int32_t>(prompt.size()))] = kNan;
    return prompt;
  }

  void disturb() {
    const int32_t dice = below(100);
    if (dice < 30) {
      if (num_left_ > 0) add_group();
    } else if (dice < 36) {
      if (num_left_ > 0) add_score();
    } else if (dice < 38) {
      abort();
    } else if (dice < 40) {
      switch_weights();
    } else if (dice < 44) {
      set_admits(!rig_.engine.state().admits);
    } else if (dice < 46) {
      sleep();
    }
  }

  void add_group() {
    --num_left_;
    GroupRequest group =
        random_group(random_, static_cast<int64_t>(groups_.size()), kMaxPrompt, kMaxResponse);
    group.prompt_ids = std::make_shared<const std::vector<int32_t>>(random_prompt());
    ASSERT_FALSE(check_group(group, rig_.engine.state().limits, ""));
    groups_.push_back(group);
    rig_.engine.add(group);
  }

  void add_score() {
    --num_left_;
    bridge::ScoreSequence sequence{.input_ids = random_prompt()};
    for (int32_t count = below(kMaxResponse); count > 0; --count) {
      sequence.response_ids.push_back(below(kVocab));
    }
    scores_.push_back(sequence);
    rig_.engine.add_score({.ticket = scores_.size() - 1, .sequence = sequence});
    stamp_scores();
  }

  void abort() {
    if (groups_.empty()) return;
    const auto request = static_cast<int64_t>(below(static_cast<int32_t>(groups_.size())));
    if (below(8) == 0) {
      rig_.engine.abort(std::nullopt);
    } else {
      rig_.engine.abort(request);
    }
    rig_.expect_accounts_balance();
  }

  void switch_weights() {
    ASSERT_TRUE(rig_.engine.finish_steps(10s));
    stamp_scores();
    ++version_;
    rig_.backend->set_version(static_cast<uint64_t>(version_));
    rig_.engine.switch_version(version_);
    num_steps_of_oldest_ = 0;
    EXPECT_EQ(rig_.engine.state().pool.num_free(), rig_.engine.state().pool.num_pages())
        << "old keys are kept over a switch";
  }

  // Gives the memory back and takes it again, after level 2 with other weights.
  void sleep() {
    ASSERT_TRUE(rig_.engine.finish_steps(10s));
    stamp_scores();
    const int level = 1 + below(2);
    rig_.engine.sleep(level);
    ++num_sleeps_;
    num_steps_of_oldest_ = 0;
    EXPECT_EQ(rig_.engine.state().pool.num_free(), rig_.engine.state().pool.num_pages())
        << "old keys are kept over a sleep";
    rig_.engine.wake_up({.weights = true});
    ASSERT_EQ(rig_.engine.step(10s), Engine::StepOutcome::kNothingToDo);
    if (level == 2) {
      rig_.backend->commit_weights();
      switch_weights();
    }
    ASSERT_EQ(rig_.engine.step(10s), Engine::StepOutcome::kNothingToDo);
    rig_.engine.wake_up({.kv_cache = true});
    ASSERT_TRUE(rig_.engine.is_awake());
  }

  void set_admits(bool admits) {
    rig_.engine.set_admits(admits);
    num_steps_of_oldest_ = 0;
  }

  void step() {
    std::vector<uint64_t> promised;
    for (const auto& sequence : rig_.engine.state().running) {
      if (computes(*sequence) && has_promise(*sequence)) promised.push_back(sequence->arrival);
    }
    const Engine::StepOutcome outcome = rig_.engine.step(10s);
    for (const uint64_t arrival : promised) {
      ASSERT_FALSE(rig_.engine.state().waiting.contains(arrival)) << "a promise was broken";
    }
    const bool may_step =
        rig_.engine.has_started_work() || (rig_.engine.state().admits && rig_.engine.has_work());
    ASSERT_TRUE(outcome == Engine::StepOutcome::kDone || !may_step) << "work is left, but no step";
    stamp_scores();
    rig_.expect_accounts_balance();
    ASSERT_FALSE(testing::Test::HasFailure());
    ASSERT_NO_FATAL_FAILURE(expect_promises_covered());
    ASSERT_NO_FATAL_FAILURE(expect_progress());
  }

  // What was scored in this step was scored under the present weights.
  void stamp_scores() {
    for (const auto& [ticket, scored] : rig_.collected.scored) {
      score_versions_.emplace(ticket, version_);
    }
  }

  // What was promised can be had.
  void expect_promises_covered() const {
    int32_t num_wanted = 0;
    for (const auto& sequence : rig_.engine.state().running) {
      if (!has_promise(*sequence)) continue;
      num_wanted += num_pages_wanted(*sequence, rig_.engine.state());
    }
    ASSERT_LE(num_wanted, rig_.engine.state().pool.num_available());
  }

  // The oldest sequence comes to its end in bounded time, so that one after the other all do: what
  // runs when it becomes the oldest has at most a whole life each before it, three times over with
  // recomputation, at as many rows a step as there are rows for.
  void expect_progress() {
    const EngineState& state = rig_.engine.state();
    uint64_t oldest = UINT64_MAX;
    for (const auto& sequence : state.running) {
      if (!sequence->is_finished) oldest = std::min(oldest, sequence->arrival);
    }
    if (!state.waiting.empty()) oldest = std::min(oldest, state.waiting.begin()->first);
    if (!state.admits || oldest != oldest_) num_steps_of_oldest_ = 0;
    oldest_ = oldest;
    const int32_t num_rows = std::min(options_.max_num_seqs, options_.max_num_batched_tokens);
    ASSERT_LE(++num_steps_of_oldest_,
              3 * (kMaxPrompt + kMaxResponse) * options_.max_num_seqs / num_rows)
        << "the oldest sequence does not end";
  }

  void expect_all_right() {
    const Collected& out = rig_.collected;
    int64_t num_tokens = 0;
    for (const GroupRequest& group : groups_) {
      const bool is_nan = std::ranges::count(*group.prompt_ids, kNan) > 0;
      for (int32_t i = 0; i < group.key.group_size; ++i) {
        const SampleName name{group.key.request_id, i};
        ASSERT_EQ(out.samples.count(name) + out.failed.count(name), 1u)
            << "request " << name.first << ", sample " << i << " has no end or two";
        num_tokens += static_cast<int64_t>(group.prompt_ids->size());
        if (const auto failed = out.failed.find(name); failed != out.failed.end()) {
          ASSERT_TRUE(is_nan) << format_error(failed->second);
          continue;
        }
        const bridge::Sample& sample = out.samples.at(name);
        if (is_nan) {
          ASSERT_EQ(sample.finish_reason, bridge::FinishReason::kAbort);
          ASSERT_TRUE(sample.response_ids.empty()) << "drawn from NaN";
        }
        ASSERT_NO_FATAL_FAILURE(expect_stamped(sample, group));
        num_tokens += static_cast<int64_t>(sample.response_ids.size());
      }
    }
    for (uint64_t ticket = 0; ticket < scores_.size(); ++ticket) {
      const bridge::ScoreSequence& given = scores_[ticket];
      num_tokens += static_cast<int64_t>(given.input_ids.size() + given.response_ids.size());
      const bool is_nan =
          !given.response_ids.empty() && std::ranges::count(given.input_ids, kNan) > 0;
      ASSERT_EQ(out.failed_scores.count(ticket), is_nan ? 1u : 0u) << "score " << ticket;
      if (is_nan) continue;
      ASSERT_EQ(out.scored.at(ticket).logprobs,
                score_alone(given, static_cast<uint64_t>(score_versions_.at(ticket))))
          << "score " << ticket;
    }
    EXPECT_LE(counters().num_tokens_recomputed, 2 * (version_ + num_sleeps_ + 1) * num_tokens);
  }

  std::mt19937 random_;
  const RigOptions options_;
  Rig rig_;
  int32_t num_left_;  // requests still to come
  std::array<std::vector<int32_t>, 3> texts_;
  std::vector<GroupRequest> groups_;           // by request_id
  std::vector<bridge::ScoreSequence> scores_;  // by ticket
  std::map<uint64_t, int64_t> score_versions_;
  int64_t version_ = 0, num_sleeps_ = 0;
  uint64_t oldest_ = 0;
  int32_t num_steps_of_oldest_ = 0;
};

struct Totals {
  int64_t num_hits = 0;
  int64_t num_preemptions = 0;
  int64_t num_recomputed = 0;
  int64_t num_rows_after_stop = 0;
};

// The first `count` schedules.
void run_schedules(uint32_t count, Timing timing, Totals& totals) {
  for (uint32_t seed = 0; seed < count; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Schedule schedule(seed, timing);
    ASSERT_NO_FATAL_FAILURE(schedule.run());
    ASSERT_FALSE(testing::Test::HasFailure());
    totals.num_hits += schedule.counters().prefix_cache_hits;
    totals.num_preemptions += schedule.counters().num_preemptions;
    totals.num_recomputed += schedule.counters().num_tokens_recomputed;
    totals.num_rows_after_stop += schedule.counters().num_rows_after_stop;
    ASSERT_LE(schedule.counters().num_rows_after_stop, schedule.num_stopped());
  }
  // The schedules do what they are for.
  EXPECT_GT(totals.num_hits, 0);
  EXPECT_GT(totals.num_preemptions, 0);
  EXPECT_GT(totals.num_recomputed, 0);
  testing::Test::RecordProperty("prefix_cache_hits", std::to_string(totals.num_hits));
  testing::Test::RecordProperty("num_preemptions", std::to_string(totals.num_preemptions));
  testing::Test::RecordProperty("num_tokens_recomputed", std::to_string(totals.num_recomputed));
  testing::Test::RecordProperty("num_rows_after_stop", std::to_string(totals.num_rows_after_stop));
}

TEST(Schedules, KeepTheBooksStarveNobodyAndGiveEveryResultOnce) {
  Totals totals;
  ASSERT_NO_FATAL_FAILURE(run_schedules(num_schedules(), Timing::kAtOnce, totals));
  EXPECT_EQ(totals.num_rows_after_stop, 0);
}

TEST(Schedules, KeepTheirPromisesWhilePlannedAhead) {
  Totals totals;
  ASSERT_NO_FATAL_FAILURE(run_schedules(num_schedules(), Timing::kLate, totals));
  EXPECT_GT(totals.num_rows_after_stop, 0);
}

// The same with threads, of which the machine has few.
TEST(Schedules, KeepTheirPromisesOnABackendThatTakesItsTime) {
  Totals totals;
  ASSERT_NO_FATAL_FAILURE(run_schedules(num_schedules() / 10, Timing::kDelayed, totals));
  EXPECT_GT(totals.num_rows_after_stop, 0);
}

}  // namespace
}  // namespace rollpack::rollout
