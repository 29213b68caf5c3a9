#include "rollout/node_bridge/node_desk.h"

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

bridge::Sample sample_for(int32_t node, size_t num_tokens) {
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
  double number(const std::string& name) {
    for (const auto& [known, value] : desk.numbers()) {
      if (known == name) return value;
    }
    return -1;
  }

  ThreadRanks ranks{1, per_node()};
  std::map<int32_t, std::vector<std::vector<uint8_t>>> sent;  // by worker
  std::vector<std::function<void()>> later;
  NodeDesk desk{ranks.dispatcher(),
                ranks.sink,
                {kHolderOf1, kHolderOf2},
                {.send = [this](int32_t worker,
                                std::vector<uint8_t> frame) { sent[worker].push_back(frame); },
                 .later = [this](std::function<void()> task) { later.push_back(task); }}};
};

// A sample of 1 MiB and a little; 8 MiB may be under way.
TEST_F(NodeDeskTest, ANodeGetsNoMoreSamplesThanItTakesIn) {
  for (int i = 0; i < 20; ++i) desk.commit(sample_for(1, 65536));
  EXPECT_EQ(num_samples_for(kHolderOf1), 8u);
  EXPECT_EQ(number("num_samples_waiting_for_nodes"), 12);
  desk.commit(sample_for(2, 65536));
  EXPECT_EQ(num_samples_for(kHolderOf2), 1u) << "others do not wait";
  desk.handle(kHolderOf1, encode(asked::Received{size_t{5} << 20}));
  EXPECT_EQ(num_samples_for(kHolderOf1), 13u);
}

TEST_F(NodeDeskTest, ANodeThatTakesNothingInMayAskForNothingMore) {
  for (int i = 0; i < 8; ++i) desk.commit(sample_for(1, 65536));
  for (int i = 0; i < 65536; ++i) desk.commit(sample_for(1, 1));
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
  for (int i = 0; i < 20; ++i) desk.commit(sample_for(1, 65536));
  desk.forget(kHolderOf1);
  EXPECT_EQ(std::get<told::Forgotten>(news_for(kHolderOf2).back()).worker, kHolderOf1);
  for (const auto& task : std::exchange(later, {})) task();
  EXPECT_EQ(number("num_samples_undeliverable"), 12);
  desk.commit(sample_for(1, 1));
  desk.handle(kHolderOf1, encode(asked::Submit{7, numbered_prompts(1)}));  // said before it died
  EXPECT_EQ(number("num_samples_undeliverable"), 13);
  EXPECT_EQ(number("num_samples_waiting_for_nodes"), 0);
  EXPECT_EQ(num_samples_for(kHolderOf1), 8u);
  EXPECT_TRUE(news_for(kHolderOf1).empty());
}

}  // namespace
}  // namespace rollpack::rollout
