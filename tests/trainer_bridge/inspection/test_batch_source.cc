// Files that are none, and a server that is looked at while it serves a trainer.
#include "trainer_bridge/inspection/batch_source.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <fstream>

#include "tests/error_text.h"
#include "tests/trainer_bridge/inspection/hand_made_batch.h"
#include "tests/trainer_bridge/server/server_fixture.h"
#include "trainer_bridge/inspection/batch_contents.h"

namespace rollpack::bridge {
namespace {

using namespace testing;
using rollpack::testing::error_text;
using rollpack::testing::with_replaced;

class BatchFile : public ::testing::Test {
 protected:
  std::string write(const std::vector<std::byte>& bytes) {
    const std::string path = folder / "batch";
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<int64_t>(bytes.size()));
    return path;
  }
  std::string error_of(const std::string& path) {
    return with_replaced(error_text([&] { read_batch_file(path); }), folder / "", "DIR/");
  }

  TemporaryFolder folder;
};

TEST_F(BatchFile, HoldsTheBytesOfABatch) {
  const std::vector<std::byte> bytes = batch_bytes(packed_columns());
  EXPECT_EQ(read_batch_file(write(bytes)).bytes, bytes);
}

TEST_F(BatchFile, WhatIsNoBatchIsRefusedBeforeItIsRead) {
  const std::vector<std::byte> whole = batch_bytes(packed_columns());
  EXPECT_EQ(error_of(write({})),
            "data_loss: batch = 0 bytes (DIR/batch): expected at least the 64 of a header");
  EXPECT_EQ(error_of(write({whole.begin(), whole.end() - 1})),
            "data_loss: bytes = 3660 (DIR/batch): expected 3659; the end is missing");
  EXPECT_EQ(error_of(write(std::vector<std::byte>(100, std::byte{'x'}))),
            "data_loss: magic = xxxxxxxx (DIR/batch): expected RPKBATCH; this is no batch");
  std::vector<std::byte> huge = whole;
  put(huge, offsetof(BatchHeader, bytes), ~uint64_t{0});
  EXPECT_EQ(error_of(write(huge)),
            "data_loss: bytes = 18446744073709551615 (DIR/batch): expected "
            "3660; the end is missing");
}

TEST_F(BatchFile, WhatIsNoRegularFileIsRefusedWithoutWaiting) {
  const std::string file_or_socket = ": expected a regular file, or the socket of a running server";
  ASSERT_EQ(::mkfifo((folder / "fifo").c_str(), 0600), 0);
  EXPECT_EQ(error_of(folder / "fifo"), "invalid_argument: BATCH = DIR/fifo" + file_or_socket);
  EXPECT_EQ(error_of(folder / ""), "invalid_argument: BATCH = DIR/" + file_or_socket);
  EXPECT_EQ(error_of("/dev/zero"), "invalid_argument: BATCH = /dev/zero" + file_or_socket);
  EXPECT_EQ(error_of(folder / "none"),
            "not_found: BATCH = DIR/none: expected a batch file, or the socket of a running "
            "server; No such file or directory");
}

class ServerLook : public ServerTest {
 protected:
  uint64_t seq_of(const BatchCopy& copy) {
    return read_batch_table(copy.bytes, copy.origin).header.batch_seq;
  }
  std::string error_of(std::optional<int32_t> slot) {
    return with_replaced(error_text([&] { copy_from_server(path, slot); }), path, "SOCKET");
  }
};

TEST_F(ServerLook, FindsNothingBeforeTheFirstBatch) {
  start();
  EXPECT_EQ(error_of({}),
            "not_found: batch = none (SOCKET): expected a slot that holds a batch; "
            "nothing was delivered in it yet");
  EXPECT_EQ(error_of(3),
            "not_found: --slot = 3 (SOCKET): expected a slot that holds a batch; "
            "nothing was delivered in it yet");
}

TEST_F(ServerLook, CopiesWhatTheTrainerHoldsAndTheTrainerKeepsIt) {
  start({.slots = 2, .slot_bytes = 1 << 16});
  TestClient trainer = connect();
  trainer.submit({{1, 2}, {3, 4, 5}}, 2);
  const Json first = trainer.next_batch(1), second = trainer.next_batch(1);
  const std::vector<std::byte> held = trainer.bytes_of(second);

  const BatchCopy copy = copy_from_server(path, {});
  EXPECT_EQ(copy.state, "delivered");
  EXPECT_EQ(copy.bytes, held);
  const BatchTable table = read_batch_table(copy.bytes, copy.origin);
  EXPECT_EQ(read_batch_contents(table).samples.size(), 2u);
  EXPECT_EQ(seq_of(copy_from_server(path, first.at("slot").get<int32_t>())), 1u);

  EXPECT_EQ(trainer.bytes_of(second), held);
  EXPECT_EQ(stat(trainer, "num_slots_in_use"), 2);
  EXPECT_TRUE(trainer.release(first).at("ok"));
  EXPECT_TRUE(trainer.release(second).at("ok"));
  EXPECT_EQ(stat(trainer, "num_batches_delivered"), 2);
  EXPECT_EQ(stat(trainer, "num_batches_redelivered"), 0);
  EXPECT_EQ(copy_from_server(path, {}).state, "released");
  EXPECT_EQ(copy_from_server(path, {}).bytes, held);
}

TEST_F(ServerLook, LeavesWhatAVanishedTrainerHeldForTheNext) {
  start({.slots = 2, .slot_bytes = 1 << 16});
  std::vector<std::byte> held;
  {
    TestClient trainer = connect();
    trainer.submit({{1, 2}}, 2);
    held = trainer.bytes_of(trainer.next_batch(1));
  }
  TestClient next = connect();
  wait_until([&] { return stat(next, "num_batches_left_behind") == 1; }, "the trainer's end");
  const BatchCopy copy = copy_from_server(path, {});
  EXPECT_EQ(copy.state, "left behind");
  EXPECT_EQ(copy.bytes, held);
  EXPECT_EQ(next.bytes_of(next.next_batch()), held);
}

// An onlooker that stays connected is no client with slots: a trainer that goes still gets its
// memory replaced, so that views it may live on with never change.
TEST_F(ServerLook, DoesNotChangeWhatBecomesOfATrainersMemory) {
  start({.slots = 1, .slot_bytes = 1 << 16});
  TestClient onlooker(path, /*says_hello=*/false);
  TestClient trainer = connect();
  trainer.submit({{1, 2}}, 1);
  const Json batch = trainer.next_batch(1);
  ASSERT_TRUE(onlooker.request("inspect").at("ok"));
  const std::vector<std::byte> held = trainer.bytes_of(batch);
  ::shutdown(trainer.socket(), SHUT_RDWR);
  wait_until(
      [&] { return onlooker.request("inspect").at("slots")[0].at("state") == "left behind"; },
      "the trainer's end");
  TestClient next = connect();
  next.release(next.next_batch());
  next.submit({{9, 8, 7}}, 1);
  EXPECT_NE(next.bytes_of(next.next_batch(1)), held);
  EXPECT_EQ(trainer.bytes_of(batch), held);
}

TEST_F(ServerLook, NamesAServerThatIsGone) {
  EXPECT_EQ(error_of({}),
            "unavailable: BATCH = SOCKET: expected the socket of a running server; No "
            "such file or directory");
}

}  // namespace
}  // namespace rollpack::bridge
