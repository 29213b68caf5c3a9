#include "rollout/cluster/dispatcher.h"

#include <gtest/gtest.h>

#include <future>

#include "kernels/base/error.h"
#include "tests/error_text.h"
#include "tests/rollout/cluster/thread_ranks.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;
using rollpack::testing::error_text;

TEST(Dispatcher, GivesTheSameSamplesOnAnyNumberOfRanks) {
  const auto alone = run(1, 20);
  ASSERT_EQ(alone.size(), 60u);
  for (const int num_ranks : {2, 3}) {
    const auto shared = run(num_ranks, 20);
    ASSERT_EQ(shared.size(), alone.size());
    for (const auto& [name, sample] : alone) expect_equal(sample, shared.at(name));
  }
}

TEST(Dispatcher, UsesEveryRankForAFewGroups) {
  ThreadRanks ranks(3);
  ranks.dispatcher().submit(numbered_prompts(6));
  ASSERT_TRUE(ranks.sink.wait_for(18));
  // Their numbers follow within the statistics' interval.
  double num_samples = 0;
  for (int i = 0; i < 300 && num_samples < 18; ++i) {
    for (const auto& [name, value] : ranks.dispatcher().stats()) {
      if (name == "num_samples") num_samples = value;
    }
    std::this_thread::sleep_for(10ms);
  }
  EXPECT_EQ(num_samples, 18);
}

TEST(Dispatcher, AcceptsAllPromptsOfASubmitOrNone) {
  ThreadRanks ranks(1);
  auto prompts = numbered_prompts(3);
  prompts[2].input_ids = {5, 71};
  EXPECT_EQ(error_text([&] { ranks.dispatcher().submit(prompts); }),
            "invalid_argument: input_ids[1] = 71 (prompts[2]): expected token ids from 0 to 70");
  prompts[2].input_ids.assign(33, 1);
  EXPECT_EQ(error_text([&] { ranks.dispatcher().submit(prompts); }),
            "invalid_argument: input_ids = 33 tokens (prompts[2]): expected at most "
            "rollout.prompt_length = 32 tokens; raise rollout.prompt_length, or set "
            "rollout.prompt_overflow to skip or "
            "truncate_left");
  prompts[2].n = 1000000000;
  EXPECT_EQ(error_text([&] { ranks.dispatcher().submit(prompts); }),
            "invalid_argument: n = 1000000000 (prompts[2]): expected 1 to 65536");
  prompts[2].n = 1;
  prompts[2].input_ids = {};
  EXPECT_EQ(error_text([&] { ranks.dispatcher().submit(prompts); }),
            "invalid_argument: input_ids = [] (prompts[2]): expected at least one token");
  prompts[2] = prompts[0];
  prompts[2].origin = "prompts[2]";
  EXPECT_EQ(error_text([&] { ranks.dispatcher().submit(prompts); }),
            "invalid_argument: prompt_id = p0 (prompts[2]): expected an id that no other live "
            "prompt has; prompts[0] has it too");
  EXPECT_EQ(ranks.dispatcher().abort(std::nullopt), 0) << "nothing was accepted";
}

TEST(Dispatcher, SkipsOrTruncatesPromptsThatAreTooLong) {
  for (const char* overflow : {"skip", "truncate_left"}) {
    Config config = tiny_config();
    config.rollout.prompt_overflow = overflow;
    ThreadRanks ranks(1, config);
    auto prompts = numbered_prompts(2);
    prompts[1].input_ids.assign(33, 4);
    prompts[1].input_ids[0] = 9;
    ranks.dispatcher().submit(prompts);
    ASSERT_TRUE(ranks.sink.wait_for(6));
    if (std::string(overflow) == "skip") {
      ASSERT_EQ(ranks.sink.failed().size(), 3u);
      EXPECT_EQ(ranks.sink.failed()[0].error.field, "input_ids");
    } else {
      EXPECT_EQ(*ranks.sink.samples().at({"p1", 0}).prompt_ids, std::vector<int32_t>(32, 4));
    }
  }
}

TEST(Dispatcher, AbortHandsBackEverySampleOnce) {
  Config config = tiny_config();
  config.rollout.response_length = 90;
  config.rollout.ignore_eos = true;
  ThreadRanks ranks(2, config);
  const int64_t id = ranks.dispatcher().submit(numbered_prompts(30));
  EXPECT_GT(ranks.dispatcher().abort(id), 0);
  ASSERT_TRUE(ranks.sink.wait_for(90));
  int num_aborted = 0;
  for (const auto& [name, sample] : ranks.sink.samples()) {
    num_aborted += sample.finish_reason == bridge::FinishReason::kAbort;
    EXPECT_EQ(sample.logprobs.size(), sample.response_ids.size());
  }
  EXPECT_GT(num_aborted, 0);
  EXPECT_EQ(ranks.dispatcher().abort(id), 0);
}

TEST(Dispatcher, PausesAndResumes) {
  ThreadRanks ranks(2);
  Waiter paused;
  ranks.dispatcher().pause(bridge::InFlight::kKeep, paused.callback());
  ASSERT_FALSE(paused.wait());
  ranks.dispatcher().submit(numbered_prompts(4));
  std::this_thread::sleep_for(50ms);
  EXPECT_TRUE(ranks.sink.samples().empty());
  ranks.dispatcher().resume();
  EXPECT_TRUE(ranks.sink.wait_for(12));
}

TEST(Dispatcher, EndsTheJobWhenARankIsLostAndFailsWhatWaits) {
  ThreadRanks ranks(2);
  std::promise<void> ended;
  ranks.dispatcher().set_on_end([&] { ended.set_value(); });
  ranks.dispatcher().lose_worker(
      1, {.code = ErrorCode::kUnavailable, .field = "rank 1", .value = "gone"});
  EXPECT_EQ(ended.get_future().wait_for(10s), std::future_status::ready);
  EXPECT_EQ(format_error(*ranks.dispatcher().health()), "rank 1 = gone");
  EXPECT_EQ(error_text([&] { ranks.dispatcher().submit(numbered_prompts(1)); }),
            "unavailable: rank 1 = gone");
}

TEST(Dispatcher, MeasuresStepsOnAllRanksAndChangesTheirBatching) {
  ThreadRanks ranks(2);
  Dispatcher& dispatcher = ranks.dispatcher();
  Waiter refused;
  dispatcher.measure("shuffled", refused.callback());
  const bridge::Outcome error = refused.wait();
  ASSERT_TRUE(error);
  EXPECT_EQ(error->field, "engine.batching");

  for (const char* batching : {"continuous", "left_padded"}) {
    Waiter measuring;
    dispatcher.measure(batching, measuring.callback());
    ASSERT_FALSE(measuring.wait());
    std::vector<bridge::PromptRequest> prompts = numbered_prompts(8);
    for (auto& prompt : prompts) prompt.prompt_id->text += batching;
    dispatcher.submit(prompts);
    const size_t num_samples = batching == std::string("continuous") ? 24 : 48;
    ASSERT_TRUE(ranks.sink.wait_for(num_samples));
    std::promise<Measurement> promise;
    dispatcher.take_measurement(
        [&](bridge::Outcome, Measurement measured) { promise.set_value(std::move(measured)); });
    const Measurement measured = promise.get_future().get();
    EXPECT_EQ(measured.first_token_times_s.size(), 24u) << batching;
    EXPECT_FALSE(measured.step_flops.empty());
    EXPECT_EQ(measured.step_flops.size(), measured.step_bytes.size());
    EXPECT_GT(measured.compute_s, 0);
    EXPECT_GT(measured.stats.at("num_steps"), 0);
    // Of the modes only left_padded computes pads.
    EXPECT_EQ(measured.stats.at("num_pad_rows") > 0, batching == std::string("left_padded"));
  }
}

}  // namespace
}  // namespace rollpack::rollout
