// A dispatcher that goes on from what was written down in a life before it.
#include <gtest/gtest.h>

#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "kernels/base/error.h"
#include "tests/error_text.h"
#include "tests/rollout/cluster/thread_ranks.h"

namespace rollpack::rollout {
namespace {

using rollpack::testing::error_text;
using Samples = std::map<KeepingSink::Name, bridge::Sample>;

class KeptLog : public RequestLog {
 public:
  void accepted(int64_t request_id, std::vector<AcceptedGroup> groups) override {
    restored.num_requests = request_id + 1;
    for (AcceptedGroup& group : groups) {
      const auto size = static_cast<size_t>(group.request.key.group_size);
      restored.groups.push_back({.accepted = std::move(group), .is_done = std::vector<bool>(size)});
    }
  }
  void aborted(std::optional<int64_t>) override { ++num_aborts; }
  void switched(int64_t weight_version) override { restored.weight_version = weight_version; }

  RestoredRequests restored;
  int num_aborts = 0;
};

// What a first life accepts, and what it makes of it.
struct FirstLife {
  explicit FirstLife(int num_prompts) {
    ThreadRanks ranks(1);
    ranks.dispatcher().restore(log, {});
    ranks.dispatcher().submit(numbered_prompts(num_prompts));
    EXPECT_TRUE(ranks.sink.wait_for(static_cast<size_t>(3 * num_prompts)));
    samples = ranks.sink.samples();
    ranks.dispatcher().forget_log();
  }
  KeptLog log;
  Samples samples;
};

TEST(Restart, OpenSamplesComeAgainUnderTheirNamesAndOthersDoNot) {
  FirstLife first(6);
  RestoredRequests restored = first.log.restored;
  restored.groups[2].is_done = {true, false, true};
  restored.groups[3].is_done = {true, true, true};
  restored.weight_version = 1;  // so that nothing ends before it was looked at
  ThreadRanks ranks(2);
  KeptLog log;
  ranks.dispatcher().restore(log, restored);
  auto prompts = numbered_prompts(1);
  EXPECT_NE(error_text([&] { ranks.dispatcher().submit(prompts); }).find("of a live request"),
            std::string::npos);
  ranks.dispatcher().resume();
  ASSERT_TRUE(ranks.sink.wait_for(13));
  const Samples samples = ranks.sink.take_samples();
  EXPECT_EQ(samples.size(), 13u);
  for (const auto& [name, sample] : samples) {
    const bridge::Sample& before = first.samples.at(name);
    expect_equal(sample, before);
    EXPECT_EQ(sample.key.request_id, before.key.request_id);
    EXPECT_EQ(sample.key.prompt_index, before.key.prompt_index);
  }
  EXPECT_TRUE(samples.contains({"p2", 1}));
  EXPECT_EQ(ranks.dispatcher().submit(prompts), 1) << "request ids go on";
  ranks.dispatcher().forget_log();
}

TEST(Restart, APartialSampleIsMadeUpToWhereItWasAborted) {
  FirstLife first(2);
  RestoredRequests restored = first.log.restored;
  ASSERT_GT(first.samples.at({"p1", 1}).response_ids.size(), 2u);
  restored.groups[1].cut_lengths = {{0, 0}, {1, 2}};
  ThreadRanks ranks(2);
  KeptLog log;
  ranks.dispatcher().restore(log, restored);
  ASSERT_TRUE(ranks.sink.wait_for(6));
  Samples samples = ranks.sink.samples();
  const bridge::Sample& cut = samples.at({"p1", 1});
  const bridge::Sample& whole = first.samples.at({"p1", 1});
  EXPECT_EQ(cut.finish_reason, bridge::FinishReason::kAbort);
  EXPECT_EQ(cut.stop_token_id, -1);
  ASSERT_EQ(cut.response_ids.size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(cut.response_ids[i], whole.response_ids[i]);
    EXPECT_EQ(cut.logprobs[i], whole.logprobs[i]);
  }
  EXPECT_EQ(samples.at({"p1", 0}).finish_reason, bridge::FinishReason::kAbort);
  EXPECT_TRUE(samples.at({"p1", 0}).response_ids.empty());
  expect_equal(samples.at({"p1", 2}), first.samples.at({"p1", 2}));
  ranks.dispatcher().forget_log();
}

TEST(Restart, WhatWasAbortedComesEmptyAndWhatWasSkippedFails) {
  FirstLife first(2);
  RestoredRequests restored = first.log.restored;
  restored.groups[0].is_aborted = true;
  restored.groups[0].is_done = {false, true, false};
  restored.groups[1].accepted.skipped = ErrorInfo{.field = "input_ids"};
  ThreadRanks ranks(1);
  KeptLog log;
  ranks.dispatcher().restore(log, restored);
  ASSERT_TRUE(ranks.sink.wait_for(5));
  EXPECT_EQ(ranks.sink.samples().size(), 2u);
  for (const auto& [name, sample] : ranks.sink.samples()) {
    EXPECT_EQ(sample.finish_reason, bridge::FinishReason::kAbort);
    EXPECT_TRUE(sample.response_ids.empty());
  }
  EXPECT_EQ(ranks.sink.failed().size(), 3u);
  EXPECT_EQ(ranks.sink.failed()[0].error.field, "input_ids");
  ranks.dispatcher().forget_log();
}

TEST(Restart, NothingIsMadeBeforeTheWeightsAreThereOrResumeIsCalled) {
  FirstLife first(2);
  RestoredRequests restored = first.log.restored;
  restored.weight_version = 7;
  ThreadRanks ranks(1);
  KeptLog log;
  ranks.dispatcher().restore(log, restored);
  EXPECT_EQ(ranks.dispatcher().awaited_weight_version(), 7);
  EXPECT_FALSE(ranks.sink.wait_for(1, std::chrono::seconds(0)));
  log.restored.weight_version = -1;
  ranks.dispatcher().resume();
  ASSERT_TRUE(ranks.sink.wait_for(6));
  EXPECT_EQ(log.restored.weight_version, 0) << "what is current is written down";
  for (const auto& [name, sample] : ranks.sink.samples()) {
    expect_equal(sample, first.samples.at(name));
  }
  EXPECT_FALSE(ranks.dispatcher().awaited_weight_version());
  ranks.dispatcher().forget_log();
}

TEST(Restart, AbortsAreWrittenDown) {
  KeptLog log;
  ThreadRanks ranks(1);
  ranks.dispatcher().restore(log, {});
  ranks.dispatcher().abort(std::nullopt);
  EXPECT_EQ(log.num_aborts, 1);
  ranks.dispatcher().forget_log();
}

TEST(Restart, ALostLogEndsTheJobWithItsError) {
  KeptLog log;
  ThreadRanks ranks(1);
  ranks.dispatcher().restore(log, {});
  ranks.dispatcher().lose_log({.code = ErrorCode::kResourceExhausted, .field = "cluster.journal"});
  ASSERT_TRUE(ranks.dispatcher().health());
  EXPECT_EQ(ranks.dispatcher().health()->field, "cluster.journal");
  EXPECT_NE(error_text([&] { ranks.dispatcher().submit(numbered_prompts(1)); }).find("journal"),
            std::string::npos);
  ranks.dispatcher().forget_log();
}

}  // namespace
}  // namespace rollpack::rollout
