#include <gtest/gtest.h>

#include "rollout/node_bridge/node_messages.h"
#include "rollout/node_bridge/sample_frame.h"
#include "tests/error_text.h"

namespace rollpack::rollout {
namespace {

bridge::Sample some_sample() {
  return {.key = {.request_id = 5,
                  .prompt_index = 2,
                  .prompt_id = {.text = "gsm8k-\xc3\xa4", .is_integer = false},
                  .sample_index = 1,
                  .group_size = 4,
                  .node = 3},
          .prompt_ids = std::make_shared<const std::vector<int32_t>>(std::vector{4, 5, 6}),
          .response_ids = {7, 2},
          .logprobs = {-0.5f, -1.25f},
          .scaled_logprobs = {-0.25f, -1.5f},
          .support_logmass = {0.0f, -0.125f},
          .entropy = {1.0f, 2.0f},
          .ref_log_prob = {-3.0f, -4.0f},
          .finish_reason = bridge::FinishReason::kStop,
          .stop_token_id = 2,
          .temperature = 0.5f,
          .weight_versions = {{0, 1}, {1, 2}}};
}

TEST(SampleFrame, HoldsAWholeSample) {
  const bridge::Sample sample = some_sample();
  const std::vector<uint8_t> body = encode_sample_frame(8, 2, sample);
  EXPECT_TRUE(is_sample_frame(body));
  EXPECT_TRUE(is_node_frame(body));
  const SampleFrame frame = decode_sample_frame(body);
  EXPECT_EQ(frame.worker, 8);
  EXPECT_EQ(frame.attempt, 2);
  EXPECT_EQ(frame.sample.key.request_id, 5);
  EXPECT_EQ(frame.sample.key.prompt_index, 2);
  EXPECT_EQ(frame.sample.key.prompt_id, sample.key.prompt_id);
  EXPECT_EQ(frame.sample.key.sample_index, 1);
  EXPECT_EQ(frame.sample.key.group_size, 4);
  EXPECT_EQ(frame.sample.key.node, 3);
  EXPECT_EQ(*frame.sample.prompt_ids, *sample.prompt_ids);
  EXPECT_EQ(frame.sample.response_ids, sample.response_ids);
  EXPECT_EQ(frame.sample.logprobs, sample.logprobs);
  EXPECT_EQ(frame.sample.scaled_logprobs, sample.scaled_logprobs);
  EXPECT_EQ(frame.sample.support_logmass, sample.support_logmass);
  EXPECT_EQ(frame.sample.entropy, sample.entropy);
  EXPECT_EQ(frame.sample.ref_log_prob, sample.ref_log_prob);
  EXPECT_EQ(frame.sample.finish_reason, sample.finish_reason);
  EXPECT_EQ(frame.sample.stop_token_id, 2);
  EXPECT_EQ(frame.sample.temperature, 0.5f);
  EXPECT_EQ(frame.sample.weight_versions, sample.weight_versions);
}

TEST(SampleFrame, TheListsOfAResponseAreNotCopied) {
  std::vector<uint8_t> body = encode_sample_frame(8, 2, some_sample());
  const uint8_t* const begin = body.data();
  const uint8_t* const end = begin + body.size();
  bridge::Sample sample = decode_sample_frame(std::move(body)).sample;
  for (const void* list : std::initializer_list<const void*>{
           sample.response_ids.data(), sample.logprobs.data(), sample.ref_log_prob.data()}) {
    EXPECT_TRUE(list >= begin && list < end);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(list) % 4, 0u);
  }
  const bridge::Numbers<float> kept = sample.logprobs;
  sample = {};
  EXPECT_EQ(kept, some_sample().logprobs) << "the frame lives as long as any of them";
}

TEST(SampleFrame, OneThatWasCutAnywhereOrHasMoreIsRefused) {
  std::vector<uint8_t> body = encode_sample_frame(8, 2, some_sample());
  for (size_t length = 0; length < body.size(); ++length) {
    EXPECT_THROW(decode_sample_frame({body.begin(), body.begin() + static_cast<long>(length)}),
                 Error)
        << length;
  }
  body.push_back(0);
  EXPECT_THROW(decode_sample_frame(body), Error);
}

TEST(SampleFrame, ASampleThatNoFrameHoldsIsAnErrorThatSaysSo) {
  bridge::Sample sample = some_sample();
  sample.logprobs.own().resize(size_t{5} << 20);
  EXPECT_EQ(testing::error_text([&] { encode_sample_frame(0, 0, sample); }).substr(0, 27),
            "resource_exhausted: sample ");
}

TEST(NodeMessages, ARequestComesAsItWent) {
  bridge::PromptRequest prompt{.prompt_id = bridge::PromptId{"7", true},
                               .input_ids = {1, 2},
                               .n = 3,
                               .sampling = {.temperature = 0.5f,
                                            .seed = ~uint64_t{0},
                                            .stop_token_ids = std::vector{5},
                                            .ignore_eos = true},
                               .origin = "submit prompts[0]"};
  const auto frame = encode(asked::Submit{9, {prompt, {.input_ids = {3}}}});
  EXPECT_TRUE(is_node_frame(frame));
  const auto submit = std::get<asked::Submit>(decode_node_request(frame));
  EXPECT_EQ(submit.ticket, 9u);
  ASSERT_EQ(submit.prompts.size(), 2u);
  const bridge::PromptRequest& first = submit.prompts[0];
  EXPECT_EQ(first.prompt_id, prompt.prompt_id);
  EXPECT_TRUE(first.prompt_id->is_integer);
  EXPECT_EQ(first.input_ids, prompt.input_ids);
  EXPECT_EQ(first.n, 3);
  EXPECT_EQ(first.sampling.temperature, 0.5f);
  EXPECT_EQ(first.sampling.top_k, std::nullopt);
  EXPECT_EQ(first.sampling.seed, ~uint64_t{0});
  EXPECT_EQ(first.sampling.stop_token_ids, std::vector{5});
  EXPECT_EQ(first.sampling.ignore_eos, true);
  EXPECT_EQ(first.origin, prompt.origin);
  EXPECT_EQ(submit.prompts[1].prompt_id, std::nullopt);
}

TEST(NodeMessages, NewsComeAsTheyWent) {
  const bridge::SampleKey key = some_sample().key;
  const auto decided = std::get<told::Decided>(
      decode_node_news(encode(told::Decided{6, key, 4, Verdict::kCommitAsAborted})));
  EXPECT_EQ(decided.worker, 6);
  EXPECT_EQ(decided.key.sample_index, 1);
  EXPECT_EQ(decided.attempt, 4);
  EXPECT_EQ(decided.verdict, Verdict::kCommitAsAborted);
  const auto open = std::get<told::Open>(decode_node_news(encode(
      told::Open{.info = {.resolved_config_json = "{}", .eos_token_ids = {2}, .vocab_size = 71},
                 .state = {.weight_version = 3,
                           .awaited_weight_version = 4,
                           .health = ErrorInfo{.field = "workers", .value = "none left"}}})));
  EXPECT_EQ(open.info.eos_token_ids, std::vector{2});
  EXPECT_EQ(open.info.vocab_size, 71);
  EXPECT_EQ(open.state.weight_version, 3);
  EXPECT_EQ(open.state.awaited_weight_version, 4);
  EXPECT_EQ(open.state.health->value, "none left");
}

TEST(NodeMessages, WhereABridgeIsComesAsItWent) {
  const auto find = std::get<asked::FindBridge>(decode_node_request(encode(asked::FindBridge{7})));
  EXPECT_EQ(find.node, 7);
  const auto bridge = std::get<told::BridgeAt>(
      decode_node_news(encode(told::BridgeAt{.node = 7, .address = "fd00::1", .port = 4242})));
  EXPECT_EQ(bridge.node, 7);
  EXPECT_EQ(bridge.address, "fd00::1");
  EXPECT_EQ(bridge.port, 4242);
  EXPECT_EQ(decode_receipt(encode_receipt(~uint64_t{0})), ~uint64_t{0});
  EXPECT_THROW(decode_receipt(std::vector<uint8_t>{0x80}), Error);
}

TEST(NodeMessages, WhatADeliveryWritesDownComesAsItWent) {
  const bridge::FormedBatch batch{.batch_seq = 7,
                                  .num_groups = 1,
                                  .step = 2,
                                  .dp_rank = 1,
                                  .dp_size = 2,
                                  .row_starts = {0, 1},
                                  .samples = {{5, 2, 1, 12}}};
  const auto formed =
      std::get<asked::Formed>(decode_node_request(encode(asked::Formed{{batch, batch}})));
  ASSERT_EQ(formed.batches.size(), 2u);
  EXPECT_EQ(formed.batches[1].batch_seq, 7u);
  EXPECT_EQ(formed.batches[1].step, 2u);
  EXPECT_EQ(formed.batches[1].samples, batch.samples);
  const auto open = std::get<told::Open>(decode_node_news(
      encode(told::Open{.restored = bridge::RestoredDelivery{.instance = "i-1",
                                                             .last_batch_seq = 9,
                                                             .num_steps = 4,
                                                             .batches = {batch},
                                                             .unformed = {{5, {0, 3}}}}})));
  ASSERT_TRUE(open.restored);
  EXPECT_EQ(open.restored->instance, "i-1");
  EXPECT_EQ(open.restored->last_batch_seq, 9u);
  EXPECT_EQ(open.restored->num_steps, 4u);
  EXPECT_EQ(open.restored->batches.at(0).row_starts, batch.row_starts);
  EXPECT_EQ(open.restored->unformed.at(0).request_id, 5);
  EXPECT_EQ(open.restored->unformed.at(0).prompt_indices, (std::vector{0, 3}));
}

TEST(NodeMessages, BytesThatAreNoneAreRefused) {
  for (const std::vector<uint8_t>& body : {std::vector<uint8_t>{0xC0},
                                           {0xC0, 0x80},
                                           {0xC0, 0xC0},
                                           {0xC0, 0x81, 0xA4, 't', 'y', 'p'}}) {
    EXPECT_THROW(decode_node_request(body), Error);
    EXPECT_THROW(decode_node_news(body), Error);
  }
}

}  // namespace
}  // namespace rollpack::rollout
