#include <algorithm>
#include <cstddef>

#include <gtest/gtest.h>

#include "tests/error_text.h"
#include "tests/rollout/node_bridge/thread_nodes.h"
#include "trainer_bridge/contract/batch_schema.h"
#include "trainer_bridge/server/server.h"

namespace rollpack::rollout {
namespace {

using bridge::Json;
using bridge::TestClient;
using testing::error_text;

std::vector<std::vector<int32_t>> some_prompts(int count) {
  std::vector<std::vector<int32_t>> prompts;
  for (int i = 0; i < count; ++i) prompts.push_back({5 + i % 60, 7, 9 + i % 50, 11 + i % 30});
  return prompts;
}

// All groups of a request in one batch whose order does not depend on timing.
std::vector<std::byte> whole_batch(TestClient& client, int num_groups) {
  const Json batch = client.request(
      "next_batch", {{"num_groups", num_groups}, {"order", "canonical"}, {"timeout_ms", 30000}});
  EXPECT_EQ(batch.value("num_samples", 0), 3 * num_groups) << batch;
  return client.bytes_of(batch);
}

// What a bridge of rank 0 alone makes of the prompts.
std::vector<std::byte> reference_batch(const std::vector<std::vector<int32_t>>& prompts) {
  testing::TemporaryFolder folder;
  Config config = ThreadNodes::config_in(folder.path());
  config.bridge.endpoints = "rank0";
  ThreadRanks ranks(1, config);
  bridge::Server server(server_options(config, ranks.dispatcher().info().pad_token_id));
  ranks.dispatcher().set_sink(server);
  server.start(ranks.dispatcher());
  TestClient client(config.bridge.socket);
  client.submit(prompts, 3);
  std::vector<std::byte> bytes = whole_batch(client, static_cast<int>(prompts.size()));
  server.stop();
  return bytes;
}

TEST(NodeBridge, ATrainerGetsAtItsNodeTheBytesThatRank0sBridgeWouldGive) {
  const auto prompts = some_prompts(20);
  ThreadNodes nodes;
  TestClient trainer = nodes.trainer();
  EXPECT_EQ(trainer.submit(prompts, 3), 0);
  EXPECT_EQ(whole_batch(trainer, 20), reference_batch(prompts));
  EXPECT_TRUE(nodes.sink.samples().empty()) << "not node 0's";
  EXPECT_EQ(nodes.number("num_samples_sent_to_nodes") + nodes.number("num_samples_kept_on_nodes"),
            60);
  EXPECT_EQ(nodes.number("num_open_samples"), 0);
}

TEST(NodeBridge, SamplesMadeAtTheirNodeDoNotLeaveIt) {
  ThreadNodes nodes;
  TestClient trainer = nodes.trainer();
  nodes.dispatcher().submit(numbered_prompts(40));  // node 0's own work comes first there
  trainer.submit(some_prompts(8), 3);
  whole_batch(trainer, 8);
  EXPECT_EQ(nodes.number("num_samples_kept_on_nodes"), 24);
  EXPECT_EQ(nodes.num_sample_bytes_to_node, 0);
  EXPECT_TRUE(nodes.sink.wait_for(120));
}

TEST(NodeBridge, ATrainerThatTakesNothingKeepsNoOtherNodeWaiting) {
  ThreadNodes nodes;
  TestClient trainer = nodes.trainer();
  trainer.submit(some_prompts(30), 3);
  nodes.dispatcher().submit(numbered_prompts(10));
  EXPECT_TRUE(nodes.sink.wait_for(30));
  EXPECT_EQ(nodes.sink.samples().size(), 30u);
  whole_batch(trainer, 30);
}

TEST(NodeBridge, AnAbortOfAllIsOfThatNode) {
  ThreadNodes nodes;
  TestClient trainer = nodes.trainer();
  nodes.dispatcher().pause(bridge::InFlight::kKeep, [](const bridge::Outcome&) {});
  nodes.dispatcher().submit(numbered_prompts(4));
  trainer.submit(some_prompts(5), 3);
  EXPECT_EQ(trainer.request("abort").value("num_aborted", 0), 15);
  nodes.dispatcher().resume();
  const Json batch = trainer.next_batch(5);
  EXPECT_EQ(batch["num_samples"], 15);
  EXPECT_EQ(batch["num_complete_groups"], 0);
  EXPECT_TRUE(nodes.sink.wait_for(12));
  for (const auto& [name, sample] : nodes.sink.samples()) {
    EXPECT_NE(sample.finish_reason, bridge::FinishReason::kAbort) << name.first;
  }
}

TEST(NodeBridge, ErrorsOfRank0ComeToTheTrainerThatAsked) {
  ThreadNodes nodes;
  TestClient trainer = nodes.trainer();
  EXPECT_EQ(
      error_text([&] {
        trainer.submit({{5, 71}}, 3);
      }),
      "invalid_argument: input_ids[1] = 71 (submit prompts[0]): expected token ids from 0 to 70");
  EXPECT_EQ(trainer.submit({{5, 70}}, 1), 0) << "and nothing was accepted";
}

TEST(NodeBridge, WeightsAreTakenAtRank0sBridgeAlone) {
  ThreadNodes nodes;
  TestClient trainer = nodes.trainer();
  const Json refused =
      trainer.request("update_weights", {{"phase", "begin"}, {"version", 1}})["error"];
  EXPECT_EQ(refused["code"], "failed_precondition");
  EXPECT_EQ(refused["allowed"], "at node 0's bridge");
  const Json weights = trainer.request("get_weight_version");
  EXPECT_EQ(weights["weight_version"], 0);
  EXPECT_EQ(weights["weights_hash"],
            fmt::format("{:016x}", nodes.dispatcher().weights_in_use().hash));
}

TEST(NodeBridge, ScoresPausesAndStatisticsAreAskedOfRank0) {
  ThreadNodes nodes;
  TestClient trainer = nodes.trainer();
  EXPECT_TRUE(trainer.request("pause", {{"mode", "keep"}})["ok"]);
  EXPECT_EQ(nodes.number("is_paused"), 1);
  EXPECT_EQ(trainer.request("stats")["stats"]["num_workers"], 3);
  EXPECT_TRUE(trainer.request("resume")["ok"]);
  const Json ids = bridge::to_bin(std::vector<int32_t>{5, 6});
  const Json scored = trainer.request(
      "score", {{"sequences", {{{"id", "a"}, {"input_ids", ids}, {"response_ids", ids}}}}});
  ASSERT_TRUE(scored["ok"]) << scored;
  EXPECT_EQ(scored["results"][0]["logprobs"].get_binary().size(), 8u);
}

// Rank 2 hands samples over, and is lost before it says so.
TEST(NodeBridge, WhatALostRankHasHandedOverIsNotDelivered) {
  const auto prompts = some_prompts(20);
  ThreadNodes nodes;
  nodes.other_is_mute = true;
  TestClient trainer = nodes.trainer();
  trainer.submit(prompts, 3);
  const auto num_kept = [&] { return trainer.request("stats")["stats"]["num_samples_kept"]; };
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (num_kept() == 0) ASSERT_LT(std::chrono::steady_clock::now(), deadline);
  nodes.dispatcher().lose_worker(ThreadNodes::kOther, {.code = ErrorCode::kUnavailable});
  EXPECT_EQ(whole_batch(trainer, 20), reference_batch(prompts)) << "made again, the same bits";
  EXPECT_EQ(num_kept(), 0);
  EXPECT_GT(trainer.request("stats")["stats"]["num_kept_samples_dropped"], 0);
  EXPECT_EQ(trainer.request("stats")["stats"]["num_duplicate_samples"], 0);
}

TEST(NodeBridge, SamplesOfAThirdNodeGoStraightToTheirNode) {
  const auto prompts = some_prompts(20);
  ThreadNodes nodes("", /*num_nodes=*/3);
  TestClient trainer = nodes.trainer();
  trainer.submit(prompts, 3);
  EXPECT_EQ(whole_batch(trainer, 20), reference_batch(prompts));
  const double num_straight = nodes.number("num_samples_straight_to_nodes");
  EXPECT_GT(num_straight, 0);
  EXPECT_EQ(nodes.num_detours, 0) << "none of them came to rank 0";
  EXPECT_EQ(nodes.number("num_samples_sent_to_nodes") + nodes.number("num_samples_kept_on_nodes") +
                num_straight,
            60);
  EXPECT_EQ(nodes.number("num_open_samples"), 0);
  EXPECT_EQ(trainer.request("stats")["stats"]["num_samples_kept"], 0);
}

TEST(NodeBridge, WhereThereIsNoWayBetweenTwoNodesSamplesGoThroughRank0) {
  const auto prompts = some_prompts(20);
  ThreadNodes nodes("", /*num_nodes=*/3);
  nodes.cut();
  TestClient trainer = nodes.trainer();
  trainer.submit(prompts, 3);
  EXPECT_EQ(whole_batch(trainer, 20), reference_batch(prompts));
  EXPECT_GT(nodes.num_detours, 0);
  EXPECT_EQ(nodes.number("num_samples_straight_to_nodes"), 0);
  EXPECT_EQ(nodes.number("num_open_samples"), 0);
}

// Rank 3's samples have gone straight, and it is lost before it says so.
TEST(NodeBridge, WhatAFencedRankOfAThirdNodeHasSentIsNotDelivered) {
  const auto prompts = some_prompts(20);
  ThreadNodes nodes("", /*num_nodes=*/3);
  nodes.third_is_mute = true;
  TestClient trainer = nodes.trainer();
  trainer.submit(prompts, 3);
  const auto num_kept = [&] { return trainer.request("stats")["stats"]["num_samples_kept"]; };
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (num_kept() == 0) ASSERT_LT(std::chrono::steady_clock::now(), deadline);
  nodes.dispatcher().lose_worker(ThreadNodes::kThird, {.code = ErrorCode::kUnavailable});
  EXPECT_EQ(whole_batch(trainer, 20), reference_batch(prompts)) << "made again, the same bits";
  EXPECT_EQ(num_kept(), 0);
  EXPECT_GT(trainer.request("stats")["stats"]["num_kept_samples_dropped"], 0);
  EXPECT_EQ(trainer.request("stats")["stats"]["num_duplicate_samples"], 0);
}

TEST(NodeBridge, WithItsBridgeANodesRequestsEndAndOthersGoOn) {
  ThreadNodes nodes;
  TestClient trainer = nodes.trainer();
  nodes.dispatcher().pause(bridge::InFlight::kKeep, [](const bridge::Outcome&) {});
  trainer.submit(some_prompts(20), 3);
  nodes.dispatcher().submit(numbered_prompts(4));
  nodes.dispatcher().lose_worker(ThreadNodes::kHolder, {.code = ErrorCode::kUnavailable});
  nodes.dispatcher().resume();
  EXPECT_TRUE(nodes.sink.wait_for(12));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (nodes.number("num_open_samples") > 0) {
    ASSERT_LT(std::chrono::steady_clock::now(), deadline) << "something is left at rank 0";
  }
  EXPECT_EQ(nodes.number("num_node_bridges"), 0);
  EXPECT_EQ(nodes.number("num_samples_undeliverable"), 60);
}

// A batch but for the generation of the slot it lies in.
std::vector<std::byte> without_generation(std::vector<std::byte> bytes) {
  std::fill_n(bytes.begin() + offsetof(bridge::BatchHeader, generation), sizeof(uint64_t),
              std::byte{0});
  return bytes;
}

TEST(NodeBridge, AfterARestartItGoesOnWithWhatItsTrainersHadNotReleased) {
  const testing::TemporaryFolder folder;
  const std::string journal = folder.file("journal");
  const Json two = {{"num_groups", 2}, {"order", "canonical"}, {"timeout_ms", 30000}};
  std::vector<std::byte> held;
  Json instance;
  {
    ThreadNodes nodes(journal);
    nodes.dispatcher().submit(numbered_prompts(2));
    TestClient trainer = nodes.trainer();
    instance = trainer.hello()["instance"];
    EXPECT_EQ(trainer.submit(some_prompts(6), 3), 1);
    EXPECT_TRUE(trainer.release(trainer.request("next_batch", two))["ok"]);
    const Json batch = trainer.request("next_batch", two);
    EXPECT_EQ(batch["batch_seq"], 2);
    held = without_generation(trainer.bytes_of(batch));
    EXPECT_TRUE(nodes.sink.wait_for(6));
  }
  ThreadNodes nodes(journal);
  TestClient trainer = nodes.trainer();
  EXPECT_EQ(trainer.hello()["instance"], instance);
  const Json again = trainer.request("next_batch", two);
  EXPECT_EQ(again["batch_seq"], 2);
  EXPECT_EQ(without_generation(trainer.bytes_of(again)), held);
  EXPECT_TRUE(trainer.release(again)["ok"]);
  const Json rest = trainer.request("next_batch", two);
  EXPECT_EQ(rest["batch_seq"], 3);
  EXPECT_EQ(rest["num_samples"], 6);
  EXPECT_TRUE(nodes.sink.wait_for(6)) << "node 0's, which nobody has released";
  EXPECT_EQ(trainer.submit(some_prompts(1), 1), 2);
}

TEST(NodeBridge, TrainersHearThatRank0IsGone) {
  ThreadNodes nodes;
  TestClient trainer = nodes.trainer();
  trainer.post("next_batch", {{"num_groups", 1}, {"timeout_ms", 20000}});
  TestClient onlooker = nodes.trainer();
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (onlooker.request("stats")["stats"]["num_waiting_calls"] == 0) {
    ASSERT_LT(std::chrono::steady_clock::now(), deadline);
  }
  nodes.node_bridge().stop(
      ErrorInfo{.code = ErrorCode::kUnavailable, .field = "rank 0", .value = "gone"});
  EXPECT_EQ(trainer.reply()["error"]["field"], "rank 0");
  EXPECT_TRUE(trainer.is_closed());
}

}  // namespace
}  // namespace rollpack::rollout
