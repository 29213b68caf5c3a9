// Clients that are killed: wherever they are in a slot's life, the next client gets what they had
// not released, the same bytes under the same batch_seq.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "tests/trainer_bridge/server/server_fixture.h"
#include "tests/trainer_bridge/wire/sockets.h"

namespace rollpack::bridge {
namespace {

class ClientDeath : public ServerTest {
 protected:
  // One group a prompt, all finished before this returns.
  void make_groups(TestClient& client, int num_groups) {
    std::vector<std::vector<int32_t>> prompts;
    for (int i = 0; i < num_groups; ++i) prompts.push_back({i + 1, i + 2});
    client.submit(prompts, 2);
    wait_until([&] { return stat(client, "num_finished_groups") == num_groups; }, "no groups");
  }

  // batch_seq -> bytes of everything there is to take; released again.
  std::map<uint64_t, std::vector<std::byte>> take_all(TestClient& client, int num_batches) {
    std::map<uint64_t, std::vector<std::byte>> taken;
    for (int i = 0; i < num_batches; ++i) {
      const Json batch = client.next_batch(1);
      taken[batch.at("batch_seq")] = client.bytes_of(batch);
      client.release(batch);
    }
    return taken;
  }
};

TEST_F(ClientDeath, WhatItHeldComesAgainWithTheSameBytes) {
  for (const int num_released : {0, 1, 3}) {  // holding all, half released, all released
    TearDown();
    start({.slots = 4, .slot_bytes = 1 << 16});
    TestClient next = connect();
    make_groups(next, 3);
    ClientProcess first(path, {"--take", "3", "--release", std::to_string(num_released)});
    ASSERT_EQ(first.line(), "taken 1 2 3");
    first.kill();
    wait_until([&] { return stat(next, "num_clients") == 1; }, "the killed client is still there");
    EXPECT_EQ(stat(next, "num_batches_left_behind"), 3 - num_released);
    // Delivered once more, and that one goes too: still the same bytes.
    std::map<uint64_t, std::vector<std::byte>> bytes;
    {
      TestClient second = connect();
      for (int i = num_released; i < 3; ++i) {
        const Json batch = second.next_batch();
        bytes[batch.at("batch_seq")] = second.bytes_of(batch);
      }
    }
    wait_until([&] { return stat(next, "num_clients") == 1; }, "the second is still there");
    EXPECT_EQ(take_all(next, 3 - num_released), bytes);
    EXPECT_EQ(bytes.size(), static_cast<size_t>(3 - num_released));
    EXPECT_EQ(stat(next, "num_slots_in_use"), 0);
    EXPECT_EQ(stat(next, "num_batches_delivered"), 3);
  }
}

TEST_F(ClientDeath, AWaitingClientIsServedWhatTheDeadOneHeld) {
  start({.slots = 1, .slot_bytes = 1 << 16});
  TestClient next = connect();
  make_groups(next, 1);
  ClientProcess first(path, {"--take", "1"});
  ASSERT_EQ(first.line(), "taken 1");
  next.post("next_batch", {{"timeout_ms", 10000}});
  first.kill();
  EXPECT_EQ(next.reply().at("batch_seq"), 1);
}

TEST_F(ClientDeath, IsNoticedThoughAForkedChildKeepsTheSocketOpen) {
  start();
  TestClient next = connect();
  make_groups(next, 1);
  ClientProcess first(path, {"--take", "1", "--fork"});
  ASSERT_EQ(first.line(), "taken 1");
  const auto begin = std::chrono::steady_clock::now();
  first.kill();
  EXPECT_EQ(next.next_batch().at("batch_seq"), 1);
  // The child holds the socket for 5 s: only the pidfd can have told.
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(3));
}

TEST_F(ClientDeath, EndsItsWeightUpdate) {
  start();
  TestClient next = connect();
  ClientProcess first(path, {"--begin", "5"});
  EXPECT_EQ(error_in(next.request("update_weights", {{"phase", "begin"}, {"version", 6}})).message,
            "an update to version 5 is under way");
  first.kill();
  wait_until([&] { return service->num_cancelled_updates() == 1; }, "the update goes on");
  EXPECT_TRUE(next.request("update_weights", {{"phase", "begin"}, {"version", 6}}).at("ok"));
}

// A client that only closes may live on with views of its slot.
TEST_F(ClientDeath, AClientThatClosedKeepsItsBytesThoughTheSlotIsFilledAgain) {
  start({.slots = 1, .slot_bytes = 1 << 16});
  TestClient first = connect();
  make_groups(first, 2);
  const Json batch = first.next_batch(1);
  const std::vector<std::byte> before = first.bytes_of(batch);
  first.close();
  TestClient watcher(path, /*says_hello=*/false);  // hello only once the first one is gone
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  watcher.hello();
  const Json again = watcher.next_batch();
  EXPECT_EQ(again.at("batch_seq"), batch.at("batch_seq"));
  EXPECT_TRUE(watcher.bytes_of(again) == before);
  watcher.release(again);
  const Json other = watcher.next_batch();
  EXPECT_EQ(other.at("slot"), batch.at("slot"));
  EXPECT_NE(watcher.bytes_of(other), before);
  EXPECT_TRUE(first.bytes_of(batch) == before);
}

TEST_F(ClientDeath, AThousandConnectionsLeaveNothing) {
  start();
  TestClient client = connect();
  for (int i = 0; i < 20; ++i) connect();
  wait_until([&] { return stat(client, "num_clients") == 1; }, "clients stay");
  const size_t open_before = num_open_fds();
  for (int i = 0; i < 1000; ++i) {
    TestClient visitor(path, /*says_hello=*/i % 2 == 0);
    if (i % 3 == 0) visitor.post("next_batch", {{"timeout_ms", 60000}});
  }
  wait_until([&] { return stat(client, "num_clients") == 1; }, "clients stay");
  EXPECT_EQ(num_open_fds(), open_before);
  EXPECT_EQ(stat(client, "num_waiting_calls"), 0);
}

TEST_F(ClientDeath, AnotherUsersClientIsRefusedByItsUid) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can become another user";
  start();
  // Opened up, as if someone had changed the modes: the kernel's word on the peer still holds.
  ::chmod((folder / "").c_str(), 0755);
  ::chmod((folder / "run").c_str(), 0755);
  ::chmod(path.c_str(), 0666);
  ClientProcess stranger(path, {"--uid", "65534"});
  EXPECT_EQ(stranger.line().substr(0, 24), "peer uid = 65534 (proces") << stranger.line();
  EXPECT_NE(stranger.line().find("expected 0, the user this server runs as"), std::string::npos);
  TestClient client = connect();
  EXPECT_EQ(stat(client, "num_clients"), 1);
}

}  // namespace
}  // namespace rollpack::bridge
