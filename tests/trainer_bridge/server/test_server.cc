// The server from a client's side: what each verb does, who waits for whom, what bounds hold.
#include "trainer_bridge/server/server.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/checksum.h"
#include "tests/trainer_bridge/layout/batch_reader.h"
#include "tests/trainer_bridge/server/server_fixture.h"
#include "tests/trainer_bridge/wire/sockets.h"

namespace rollpack::bridge {
namespace {

using testing::read_batch;
using testing::ReadBatch;

TEST_F(ServerTest, HelloSaysWhatTheEngineIsAndHandsOverReadOnlySlots) {
  start({.slots = 3, .slot_bytes = 1 << 16});
  TestClient client(path, /*says_hello=*/false);
  client.post("hello", {{"protocol_version", 1}, {"client", "test"}});
  const auto frame = receive_frame(client.socket(), in_ms(5000));
  ASSERT_TRUE(frame);
  const Json reply = decode_message(frame->body);
  EXPECT_EQ(reply.at("protocol_version"), 1);
  EXPECT_EQ(reply.at("schema_version"), 1);
  EXPECT_EQ(reply.at("config").at("engine").at("backend"), "fake");
  EXPECT_EQ(reply.at("eos_token_ids"), Json::binary({2, 0, 0, 0}));
  EXPECT_EQ(reply.at("vocab_size"), kFakeVocab);
  EXPECT_EQ(reply.at("weight_version"), 0);
  EXPECT_EQ(reply.at("num_slots"), 3);
  EXPECT_EQ(reply.at("slot_bytes"), 1 << 16);
  EXPECT_EQ(reply.at("num_fds"), 3);
  ASSERT_EQ(frame->fds.size(), 3u);
  for (const OwnedFd& fd : frame->fds) {
    EXPECT_EQ(::fcntl(fd.get(), F_GET_SEALS) & kOwnerSeals, kOwnerSeals);
    EXPECT_LT(::pwrite(fd.get(), "x", 1, 0), 0) << "a client can write a slot";
  }
}

TEST_F(ServerTest, SubmittedPromptsComeBackAsABatch) {
  start();
  TestClient client = connect();
  const int64_t request = client.submit({{1, 2, 3}, {40}}, 2);
  const Json notice = client.next_batch(2);
  EXPECT_EQ(notice.at("num_samples"), 4);
  const ReadBatch batch = read_batch(client.bytes_of(notice));
  EXPECT_EQ(batch.values<int64_t>("request_id"), std::vector<int64_t>(4, request));
  const auto prompts = batch.values<int32_t>("prompt_index");
  const auto indices = batch.values<int32_t>("sample_index");
  const auto starts = batch.values<int32_t>("cu_seqlens");
  const auto ids = batch.values<int32_t>("input_ids");
  for (size_t s = 0; s < 4; ++s) {
    std::vector<int32_t> expected = prompts[s] == 0 ? std::vector{1, 2, 3} : std::vector{40};
    const auto response = fake_response(expected, indices[s], 8);
    expected.insert(expected.end(), response.begin(), response.end());
    EXPECT_EQ(std::vector<int32_t>(ids.begin() + starts[s], ids.begin() + starts[s + 1]), expected);
  }
  EXPECT_TRUE(client.release(notice).at("ok"));
  EXPECT_EQ(stat(client, "num_slots_in_use"), 0);
}

TEST_F(ServerTest, FailuresAloneComeWithoutASlot) {
  start();
  TestClient client = connect();
  Json request = prompts_of({{kFakeVocab - 1}}, 2);
  request["prompts"][0]["prompt_id"] = 77;
  client.request("submit", request);
  const Json notice = client.next_batch();
  EXPECT_TRUE(notice.at("slot").is_null());
  ASSERT_EQ(notice.at("failed").size(), 2u);
  const Json& failed = notice["failed"][1];
  EXPECT_EQ(failed.at("prompt_id"), 77);  // an integer, as it was given
  EXPECT_EQ(failed.at("sample_index"), 1);
  EXPECT_EQ(failed.at("group_size"), 2);
  EXPECT_EQ(failed.at("error").at("code"), "non_finite");
  EXPECT_EQ(stat(client, "num_slots_in_use"), 0);
}

TEST_F(ServerTest, ReleasingTwiceOrForOthersIsRefused) {
  start();
  TestClient anna = connect(), berta = connect();
  anna.submit({{1}}, 1);
  const Json batch = anna.next_batch();
  EXPECT_EQ(error_in(berta.release(batch)).code, ErrorCode::kFailedPrecondition);
  Json wrong = batch;
  wrong["batch_seq"] = 99;
  EXPECT_EQ(error_in(anna.release(wrong)).field, "batch_seq");
  EXPECT_TRUE(anna.release(batch).at("ok"));
  EXPECT_EQ(error_in(anna.release(batch)).code, ErrorCode::kFailedPrecondition);
}

TEST_F(ServerTest, NextBatchWaitsForSamplesAndForSlots) {
  start({.slots = 1, .slot_bytes = 1 << 16}, {.sample_time = std::chrono::milliseconds(20)});
  TestClient client = connect();
  client.submit({{1}, {2}}, 1);
  const Json first = client.next_batch(1);
  try {
    client.next_batch(1, 100);
    FAIL() << "the only slot is held";
  } catch (const Error& error) {
    EXPECT_EQ(error.info.code, ErrorCode::kDeadlineExceeded);
    EXPECT_EQ(error.info.value, "1 finished groups after 100 ms");
    EXPECT_EQ(error.info.message, "all 1 slots are held: release batches");
  }
  client.post("next_batch", {{"num_groups", 1}, {"timeout_ms", 5000}});
  client.post("release", {{"slot", 0}, {"generation", 1}, {"batch_seq", 1}});
  const Json released = client.reply();  // replies come in any order: this one is due first
  EXPECT_FALSE(released.contains("slot"));
  EXPECT_EQ(client.reply().at("batch_seq"), 2);
}

TEST_F(ServerTest, WaitingClientsAreServedInTheOrderTheyAsked) {
  start();
  std::vector<TestClient> clients;
  for (int i = 0; i < 4; ++i) clients.push_back(connect());
  for (TestClient& client : clients) {
    client.post("next_batch", {{"num_groups", 1}, {"timeout_ms", 10000}});
    TestClient& watcher = clients.back();
    if (&client != &watcher) {
      const auto position = static_cast<double>(&client - clients.data() + 1);
      wait_until([&] { return stat(watcher, "num_waiting_calls") == position; }, "not waiting");
    }
  }
  clients[0].submit({{1}, {2}, {3}, {4}}, 1);
  EXPECT_EQ(clients[0].reply().at("batch_seq"), 1);
  EXPECT_EQ(clients[1].reply().at("batch_seq"), 2);
  EXPECT_EQ(clients[2].reply().at("batch_seq"), 3);
  EXPECT_EQ(clients[3].reply().at("batch_seq"), 4);
}

TEST_F(ServerTest, AHealthErrorFailsWaitingCallsAtOnce) {
  start();
  TestClient client = connect();
  for (int i = 0; i < 3; ++i) client.post("next_batch", {{"timeout_ms", 60000}});
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const auto begin = std::chrono::steady_clock::now();
  service->set_health(
      ErrorInfo{.code = ErrorCode::kUnavailable, .field = "rank 2", .message = "has died"});
  for (int i = 0; i < 3; ++i) EXPECT_EQ(error_in(client.reply()).field, "rank 2");
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(1));
  EXPECT_EQ(error_in(client.request("health")).message, "has died");
}

TEST_F(ServerTest, WhatWasMadeBeforeAHealthErrorIsStillDelivered) {
  start();
  TestClient client = connect();
  client.submit({{1}}, 1);
  wait_until([&] { return stat(client, "num_finished_groups") == 1; }, "no sample");
  service->set_health(ErrorInfo{.code = ErrorCode::kUnavailable, .field = "rank 2"});
  EXPECT_EQ(client.next_batch().at("num_samples"), 1);
  EXPECT_THROW(client.next_batch(), Error);
}

TEST_F(ServerTest, ABrokenPromiseOfTheServiceIsSaidAloud) {
  start();
  TestClient client = connect();
  client.post("next_batch", {{"timeout_ms", 60000}});
  server->commit(Sample{.key = {.request_id = 1, .sample_index = 3, .group_size = 2}});
  EXPECT_EQ(error_in(client.reply()).code, ErrorCode::kInternal);
  EXPECT_EQ(error_in(client.request("health")).message,
            "sample 3 of a group of 2 (request 1, prompt 0)");
}

TEST_F(ServerTest, SubmitWouldBlockWhileTooManySamplesWait) {
  start({.slot_bytes = 1 << 16, .max_held_samples = 4});
  TestClient client = connect();
  client.submit({{1}, {2}}, 2);
  wait_until([&] { return stat(client, "num_samples_held") == 4; }, "samples do not come");
  const ErrorInfo error = error_in(client.request("submit", prompts_of({{3}}, 1)));
  EXPECT_EQ(error.code, ErrorCode::kWouldBlock);
  EXPECT_EQ(error.value, "4");
  EXPECT_EQ(error.allowed, "fewer than 4");
  client.release(client.next_batch());
  EXPECT_NO_THROW(client.submit({{3}}, 1));
}

TEST_F(ServerTest, PauseHoldsResumeGoesOnAndAbortHandsBackPartialSamples) {
  start();
  TestClient client = connect();
  EXPECT_TRUE(client.request("pause", {{"mode", "keep"}}).at("ok"));
  const int64_t request = client.submit({{1}}, 2);
  EXPECT_EQ(error_in(client.request("next_batch", {{"timeout_ms", 50}})).code,
            ErrorCode::kDeadlineExceeded);
  EXPECT_EQ(client.request("abort", {{"request_id", request}}).at("num_aborted"), 2);
  const Json partial = client.next_batch();
  EXPECT_EQ(read_batch(client.bytes_of(partial)).values<uint8_t>("finish_reason"),
            (std::vector<uint8_t>{2, 2}));
  client.submit({{1}}, 1);
  client.request("resume");
  EXPECT_EQ(client.next_batch().at("num_samples"), 1);
  EXPECT_TRUE(client.request("pause", {{"mode", "wait"}}).at("ok"));
}

TEST_F(ServerTest, ScoresComeAsBinUnderTheirIds) {
  start();
  TestClient client = connect();
  const std::vector<int32_t> ids = {1, 2};
  const Json reply = client.request("score", {{"sequences",
                                               {{{"id", "a"},
                                                 {"input_ids", to_bin(std::span(ids))},
                                                 {"response_ids", to_bin(std::span(ids))}},
                                                {{"id", 7},
                                                 {"input_ids", to_bin(std::span(ids))},
                                                 {"response_ids", Json::binary({})},
                                                 {"temperature", 0.5}}}}});
  const std::vector<float> logprobs = {-0.5f, -0.515625f};
  EXPECT_EQ(reply.at("results")[0].at("id"), "a");
  EXPECT_EQ(reply.at("results")[0].at("logprobs"), to_bin(std::span(logprobs)));
  EXPECT_EQ(reply.at("results")[1].at("id"), 7);
  EXPECT_EQ(reply.at("results")[1].at("entropy"), Json::binary({}));
}

// A chunk with one tensor of the fake model, all zeros.
Json zeros_chunk(const std::string& name, int64_t version, std::vector<OwnedFd>& fds) {
  const std::vector<int64_t>& shape = fake_tensors().at(name);
  int64_t bytes = 4;
  for (const int64_t dim : shape) bytes *= dim;
  const std::vector<std::byte> zeros(static_cast<size_t>(bytes));
  OwnedFd memfd = make_memfd(std::string(static_cast<size_t>(bytes), '\0'));
  ::fcntl(memfd.get(), F_ADD_SEALS, kPeerSeals);
  fds.push_back(std::move(memfd));
  return {{"phase", "chunk"},
          {"version", version},
          {"bytes", bytes},
          {"tensors",
           {{{"name", "module." + name},
             {"dtype", "float32"},
             {"shape", shape},
             {"offset", 0},
             {"bytes", bytes},
             {"crc32", crc32_of(zeros)}}}}};
}

TEST_F(ServerTest, WeightsAreUpdatedInPhases) {
  start();
  TestClient client = connect();
  client.request("update_weights", {{"phase", "begin"}, {"version", 4}});
  for (const auto& [name, shape] : fake_tensors()) {
    std::vector<OwnedFd> fds;
    const Json chunk = zeros_chunk(name, 4, fds);
    EXPECT_TRUE(client.request("update_weights", chunk, std::move(fds)).at("ok"));
  }
  EXPECT_EQ(
      client.request("update_weights", {{"phase", "commit"}, {"version", 4}, {"mode", "wait"}})
          .at("weight_version"),
      4);
  EXPECT_EQ(client.request("get_weight_version").at("weight_version"), 4);
  client.submit({{1}}, 1);
  const ReadBatch batch = read_batch(client.bytes_of(client.next_batch()));
  EXPECT_EQ(batch.values<int32_t>("weight_versions").back(), 4);
}

// What hello answers to a probe of this process's memory.
bool reads_memory(TestClient& client, const std::vector<int32_t>& there,
                  const std::vector<int32_t>& said) {
  const Json probe = {{"address", reinterpret_cast<uint64_t>(there.data())},
                      {"value", to_bin(std::span(said))}};
  return client.request("hello", {{"protocol_version", 1}, {"client", "test"}, {"probe", probe}})
      .at("reads_memory");
}

TEST_F(ServerTest, HelloSaysWhetherTheClientsMemoryCanBeRead) {
  start();
  TestClient client = connect();
  const std::vector<int32_t> there = {3, 1, 4, 1}, other = {2, 7, 1, 8};
  EXPECT_TRUE(reads_memory(client, there, there));
  EXPECT_FALSE(reads_memory(client, there, other));
  EXPECT_FALSE(client.hello().at("reads_memory")) << "without a probe";
}

TEST_F(ServerTest, HelloSaysSoWhereTheServiceTakesNoLentWeights) {
  start({.slot_bytes = 1 << 16}, {.takes_lent_weights = false});
  TestClient client = connect();
  const std::vector<int32_t> there = {3, 1, 4, 1};
  EXPECT_FALSE(reads_memory(client, there, there));
}

TEST_F(ServerTest, WeightsThatAreLentAreReadOutOfTheClientsMemory) {
  start();
  TestClient client = connect();
  client.request("update_weights", {{"phase", "begin"}, {"version", 4}});
  std::map<std::string, std::vector<float>> tensors;
  for (const auto& [name, shape] : fake_tensors()) {
    int64_t count = 1;
    for (const int64_t dim : shape) count *= dim;
    std::vector<float>& values = tensors[name];
    for (int64_t i = 0; i < count; ++i) values.push_back(static_cast<float>(i));
    const Json tensor = {{"name", "module." + name},
                         {"dtype", "float32"},
                         {"shape", shape},
                         {"bytes", 4 * count},
                         {"address", reinterpret_cast<uint64_t>(values.data())}};
    const Json chunk = {{"phase", "chunk"}, {"version", 4}, {"lent", true}, {"tensors", {tensor}}};
    EXPECT_TRUE(client.request("update_weights", chunk).at("ok"));
  }
  const Json commit = {{"phase", "commit"}, {"version", 4}, {"mode", "wait"}};
  EXPECT_EQ(client.request("update_weights", commit).at("weight_version"), 4);
  for (const auto& [name, values] : tensors) {
    EXPECT_EQ(service->lent_crc32().at(name), crc32_of(std::as_bytes(std::span(values)))) << name;
  }
}

TEST_F(ServerTest, ACommitWithoutEveryTensorNamesTheMissingOne) {
  start();
  TestClient client = connect();
  client.request("update_weights", {{"phase", "begin"}, {"version", 1}});
  std::vector<OwnedFd> fds;
  const Json chunk = zeros_chunk("lm_head.weight", 1, fds);
  client.request("update_weights", chunk, std::move(fds));
  const Json commit = {{"phase", "commit"}, {"version", 1}, {"mode", "keep"}};
  EXPECT_EQ(error_in(client.request("update_weights", commit)).field, "model.embed_tokens.weight");
  EXPECT_EQ(error_in(client.request("update_weights", commit)).allowed, "begin first");
}

TEST_F(ServerTest, StatsJoinTheServicesAndTheServersOwn) {
  start();
  TestClient client = connect(), other = connect();
  client.submit({{1}}, 1);
  const Json batch = client.next_batch();
  EXPECT_EQ(stat(client, "num_samples"), 1);
  EXPECT_EQ(stat(client, "num_clients"), 2);
  EXPECT_EQ(stat(client, "num_slots_in_use"), 1);
  EXPECT_EQ(stat(client, "num_batches_delivered"), 1);
  EXPECT_EQ(stat(client, "num_batches_redelivered"), 0);
}

TEST_F(ServerTest, OneClientTooManyIsToldSo) {
  start({.slot_bytes = 1 << 16, .max_clients = 2});
  TestClient first = connect();
  TestClient second = connect();
  TestClient third(path, /*says_hello=*/false);
  EXPECT_EQ(error_in(third.reply()).allowed, "at most 2");
  EXPECT_TRUE(third.is_closed());
  first.close();
  wait_until([&] { return stat(second, "num_clients") == 1; }, "the first is still there");
  EXPECT_NO_THROW(connect());
}

TEST_F(ServerTest, AClientThatDoesNotReadIsDroppedAndItsBatchesComeAgain) {
  ServerOptions options{.slot_bytes = 1 << 16};
  options.frames.max_queued_bytes = 1 << 20;
  start(options);
  TestClient slow = connect(), other = connect();
  slow.submit({{1}}, 1);
  slow.next_batch();
  const std::vector<int32_t> ids(100000, 1);
  const Json score = {{"sequences",
                       {{{"id", 1},
                         {"input_ids", Json::binary({1, 0, 0, 0})},
                         {"response_ids", to_bin(std::span(ids))}}}}};
  try {
    for (int i = 0; i < 8; ++i) slow.post("score", score);  // 1.2 MB of reply each, never read
  } catch (const Error& error) {
    EXPECT_EQ(error.info.code, ErrorCode::kUnavailable);  // dropped before it had sent them all
  }
  EXPECT_EQ(other.next_batch().at("batch_seq"), 1);
  EXPECT_TRUE(slow.is_closed());
}

TEST_F(ServerTest, StopAnswersWaitingCallsAndLeavesNoFile) {
  start();
  TestClient client = connect();
  client.post("next_batch", {{"timeout_ms", 60000}});
  TestClient watcher = connect();
  wait_until([&] { return stat(watcher, "num_waiting_calls") == 1; }, "not waiting");
  const auto begin = std::chrono::steady_clock::now();
  server->stop();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(1));
  EXPECT_EQ(error_in(client.reply()).code, ErrorCode::kUnavailable);
  EXPECT_TRUE(client.is_closed());
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_FALSE(std::filesystem::exists(path + ".lock"));
}

TEST_F(ServerTest, ShutdownIsAnsweredAndAskedOfTheService) {
  start();
  std::atomic<bool> asked = false;
  service->on_shutdown = [&] { asked = true; };
  EXPECT_TRUE(connect().request("shutdown").at("ok"));
  wait_until([&] { return asked.load(); }, "the service was not asked");
}

TEST_F(ServerTest, OptionsThatCannotBeAreNamed) {
  const auto error_with = [&](ServerOptions options) {
    options.socket = path;
    return error_of([&] { Server server(options); });
  };
  EXPECT_EQ(error_with({.slots = 254}).field, "bridge.slots");
  EXPECT_EQ(error_with({.slots = 0}).field, "bridge.slots");
  EXPECT_EQ(error_with({.slot_bytes = 0}).field, "bridge.slot_bytes");
  EXPECT_EQ(error_with({.layout = {.layout = "zigzag"}}).field, "bridge.layout");
  start();
  EXPECT_EQ(error_with({}).code, ErrorCode::kFailedPrecondition);
}

TEST_F(ServerTest, SamplesMayComeBeforeTheStartAndAfterTheStop) {
  ServerOptions options{.socket = path, .slot_bytes = 1 << 16};
  server = std::make_unique<Server>(options);
  service = std::make_unique<FakeService>(FakeOptions{}, *server);
  const FailedSample early{{.request_id = 1}, {.code = ErrorCode::kNonFinite}};
  server->fail(early);
  server->start(*service);
  EXPECT_EQ(connect().next_batch().at("failed").size(), 1u);
  server->stop();
  server->fail(early);
}

}  // namespace
}  // namespace rollpack::bridge
