#include "rollout/node_bridge/node_desk.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "rollout/node_bridge/sample_frame.h"
#include "tests/rollout/cluster/thread_ranks.h"

namespace rollpack::rollout {
namespace {

constexpr int32_t kHolderOf1 = 4, kHolderOf2 = 9;

Config per_node() {
  Config config = tiny_config();
  config.bridge.endpoints = "per_node";
  return config;
}

bridge::Sample long_sample_for(int32_t node, size_t num_tokens) {
  return {.key = {.prompt_id = {.text = "p"}, .node = node},
          .prompt_ids = std::make_shared<const std::vector<int32_t>>(3, 1),
          .response_ids = std::vector<int32_t>(num_tokens, 2),
          .logprobs = std::vector<float>(num_tokens),
          .scaled_logprobs = std::vector<float>(num_tokens),
          .support_logmass = std::vector<float>(num_tokens)};
}

class NodeDeskTest : public ::testing::Test {
 protected:
  std::vector<NodeNews> news_for(int32_t worker) {
    std::vector<NodeNews> news;
    for (const auto& frame : sent[worker]) {
      if (!is_sample_frame(frame)) news.push_back(decode_node_news(frame));
    }
    return news;
  }
  size_t num_samples_for(int32_t worker) {
    return static_cast<size_t>(
        std::count_if(sent[worker].begin(), sent[worker].end(),
                      [](const auto& frame) { return is_sample_frame(frame); }));
  }
  template <class News>
  size_t num_news(int32_t worker) {
    const std::vector<NodeNews> news = news_for(worker);
    return static_cast<size_t>(std::count_if(news.begin(), news.end(), [](const auto& each) {
      return std::holds_alternative<News>(each);
    }));
  }
  double number(const std::string& name) {
    for (const auto& [known, value] : desk.numbers()) {
      if (known == name) return value;
    }
    return -1;
  }

  ThreadRanks ranks{1, per_node(), {.is_on = true}};
  std::map<int32_t, std::vector<std::vector<uint8_t>>> sent;  // by worker
  std::vector<std::function<void()>> later;
  NodeDesk desk{ranks.dispatcher(),
                ranks.sink,
                {kHolderOf1, kHolderOf2},
                {.send = [this](int32_t worker,
                                std::vector<uint8_t> frame) { sent[worker].push_back(frame); },
                 .later = [this](std::function<void()> task) { later.push_back(task); },
                 .node_of = [](int32_t worker) { return worker >= kHolderOf2 ? 2 : 1; },
                 .endpoint_of =
                     [](int32_t worker) {
                       return TcpEndpoint{{fmt::format("10.0.0.{}", worker)}, 600 + worker};
                     }}};
};

// A sample of 1 MiB and a little; 8 MiB may be under way.
TEST_F(NodeDeskTest, ANodeGetsNoMoreSamplesThanItTakesIn) {
  for (int i = 0; i < 20; ++i) desk.commit(long_sample_for(1, 65536));
  EXPECT_EQ(num_samples_for(kHolderOf1), 8u);
  EXPECT_EQ(number("num_samples_waiting_for_nodes"), 12);
  desk.commit(long_sample_for(2, 65536));
  EXPECT_EQ(num_samples_for(kHolderOf2), 1u) << "others do not wait";
  desk.handle(kHolderOf1, encode(asked::Received{size_t{5} << 20}));
  EXPECT_EQ(num_samples_for(kHolderOf1), 13u);
}

TEST_F(NodeDeskTest, ANodeThatTakesNothingInMayAskForNothingMore) {
  for (int i = 0; i < 8; ++i) desk.commit(long_sample_for(1, 65536));
  for (int i = 0; i < 65536; ++i) desk.commit(long_sample_for(1, 1));
  const std::vector<bridge::PromptRequest> prompts = numbered_prompts(1);
  desk.handle(kHolderOf1, encode(asked::Submit{7, prompts}));
  const auto answer = std::get<told::Number>(news_for(kHolderOf1).back());
  EXPECT_EQ(answer.ticket, 7u);
  ASSERT_TRUE(answer.error);
  EXPECT_EQ(answer.error->code, ErrorCode::kWouldBlock);
  desk.handle(kHolderOf2, encode(asked::Submit{8, prompts}));
  EXPECT_FALSE(std::get<told::Number>(news_for(kHolderOf2).back()).error);
}

TEST_F(NodeDeskTest, WhatALostNodeWasToGetIsDroppedAndCounted) {
  for (int i = 0; i < 20; ++i) desk.commit(long_sample_for(1, 65536));
  desk.forget(kHolderOf1);
  EXPECT_EQ(std::get<told::Forgotten>(news_for(kHolderOf2).back()).worker, kHolderOf1);
  for (const auto& task : std::exchange(later, {})) task();
  EXPECT_EQ(number("num_samples_undeliverable"), 12);
  desk.commit(long_sample_for(1, 1));
  desk.handle(kHolderOf1, encode(asked::Submit{7, numbered_prompts(1)}));  // said before it died
  EXPECT_EQ(number("num_samples_undeliverable"), 13);
  EXPECT_EQ(number("num_samples_waiting_for_nodes"), 0);
  EXPECT_EQ(num_samples_for(kHolderOf1), 8u);
  EXPECT_TRUE(news_for(kHolderOf1).empty());
}

TEST_F(NodeDeskTest, AnyRankHearsWhereABridgeIs) {
  constexpr int32_t kAsker = 11;
  const auto ask = [&](int32_t node) {
    desk.handle(kAsker, encode(asked::FindBridge{node}));
    return std::get<told::BridgeAt>(news_for(kAsker).back());
  };
  EXPECT_EQ(ask(1).node, 1);
  EXPECT_EQ(ask(1).address, "10.0.0.4");
  EXPECT_EQ(ask(1).port, 604);
  EXPECT_EQ(ask(7).port, 0) << "no such node";
  desk.forget(kHolderOf1);
  for (const auto& task : std::exchange(later, {})) task();
  EXPECT_EQ(ask(1).port, 0) << "gone";
}

TEST_F(NodeDeskTest, SamplesAreCountedByTheWayTheyWent) {
  const bridge::SampleKey key = long_sample_for(1, 1).key;
  desk.decide(kHolderOf1, key, 1, Verdict::kCommit);
  desk.decide(kHolderOf2, key, 1, Verdict::kCommitAsAborted);
  desk.decide(kHolderOf2, key, 1, Verdict::kDrop);
  desk.commit(long_sample_for(1, 1));
  EXPECT_EQ(number("num_samples_kept_on_nodes"), 1);
  EXPECT_EQ(number("num_samples_straight_to_nodes"), 1);
  EXPECT_EQ(number("num_samples_sent_to_nodes"), 1);
  EXPECT_EQ(num_news<told::Decided>(kHolderOf1), 3u);
  ranks.dispatcher().set_kept_samples(desk);
  double num_straight = 0;
  for (const auto& [name, value] : ranks.dispatcher().stats()) {
    if (name == "num_samples_straight_to_nodes") num_straight = value;
  }
  EXPECT_EQ(num_straight, 1) << "all statistics of rank 0 have it";
}

TEST_F(NodeDeskTest, WhatWasWithdrawnIsDroppedAtItsBridge) {
  ranks.dispatcher().set_kept_samples(desk);
  ranks.dispatcher().handle(0, SampleWithdrawn{long_sample_for(1, 1).key, 3});
  const auto decided = std::get<told::Decided>(news_for(kHolderOf1).back());
  EXPECT_EQ(decided.worker, 0);
  EXPECT_EQ(decided.attempt, 3);
  EXPECT_EQ(decided.verdict, Verdict::kDrop);
}

class BridgeWatchTest : public NodeDeskTest {
 protected:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kLease{4000}, kTick{250};

  BridgeWatchTest() {
    desk.handle(kHolderOf1, encode(asked::Opened{}));
    desk.handle(kHolderOf2, encode(asked::Opened{}));
    for (int32_t worker = 1; worker <= kHolderOf2; ++worker) {
      ranks.dispatcher().add_worker(std::make_shared<Gone>());
    }
    ranks.dispatcher().set_kept_samples(desk);
  }
  ~BridgeWatchTest() override {
    for (int32_t worker = 1; worker <= kHolderOf2; ++worker) {
      ranks.dispatcher().lose_worker(worker, {.code = ErrorCode::kUnavailable});
    }
  }
  // As rank 0 does it; bridges that answer do so at once.
  void let_pass(std::chrono::milliseconds time, const std::vector<int32_t>& answering) {
    for (const auto end = now + time; now < end; now += kTick) {
      desk.check_bridges(now, kLease);
      for (const int32_t worker : answering) {
        if (num_answered[worker] == num_news<told::Ping>(worker)) continue;
        ++num_answered[worker];
        desk.handle(worker, encode(asked::Present{}));
      }
    }
    for (const auto& task : std::exchange(later, {})) task();
  }

  struct Gone : WorkerLink {
    void send(Command) override {}
    bool is_own_process() const override { return true; }
  };
  Clock::time_point now = Clock::now();
  std::map<int32_t, size_t> num_answered;
};

TEST_F(BridgeWatchTest, AnIdleBridgeThatStandsStillIsLostAfterALease) {
  let_pass(3 * kLease, {kHolderOf1, kHolderOf2});
  EXPECT_EQ(number("num_node_bridges"), 2);
  EXPECT_LE(num_news<told::Ping>(kHolderOf2), 13u) << "four a lease";
  let_pass(kLease - kTick - kLease / 4, {kHolderOf1});
  EXPECT_EQ(number("num_node_bridges"), 2);
  let_pass(kLease / 4 + 4 * kTick, {kHolderOf1});
  EXPECT_EQ(number("num_node_bridges"), 1);
  desk.commit(long_sample_for(2, 1));
  EXPECT_EQ(number("num_samples_undeliverable"), 1);
}

TEST_F(BridgeWatchTest, WhenRank0StoodStillNobodyIsLost) {
  let_pass(kLease, {kHolderOf1, kHolderOf2});
  let_pass(kLease / 2, {kHolderOf1});
  now += 10 * kLease;
  let_pass(kLease / 2, {kHolderOf1, kHolderOf2});
  EXPECT_EQ(number("num_node_bridges"), 2);
}

}  // namespace
}  // namespace rollpack::rollout
