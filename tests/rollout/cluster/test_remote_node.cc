// Memory on its way to another node: once for all ranks there, whole or not at all, whoever is lost
// meanwhile. Rank 0's side and the node's in one process; a queue of frames is the network.
#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <map>
#include <optional>

#include "kernels/base/error.h"
#include "rollout/cluster/meeting.h"
#include "rollout/cluster/message_codec.h"
#include "rollout/cluster/node_memory.h"
#include "rollout/cluster/remote_node.h"
#include "tests/error_text.h"
#include "tests/rollout/cluster/memory_chunk.h"

namespace rollpack::rollout {
namespace {

using bridge::OwnedFd;

// A node with ranks, and the wire to it.
class Wire {
 public:
  explicit Wire(std::vector<int32_t> ranks)
      : node_({.transmit =
                   [this](int32_t rank, std::vector<uint8_t> body) {
                     to_node.emplace_back(rank, std::move(body));
                   },
               .tell_progress = [this](int32_t rank) { ++num_progress[rank]; },
               .answer = [this](int32_t rank, Ack ack) { answers[rank].push_back(ack); }},
              outgoing_, 1) {
    const std::string job = random_token();
    for (const int32_t rank : ranks) {
      node_.add_rank(rank);
      memories.emplace(rank, std::make_unique<NodeMemory>(job, rank));
    }
  }

  RemoteNode& node() { return node_; }

  // Lets frames arrive, `max_frames` at most; what ranks say of memory goes back at once.
  void carry(int max_frames = 1 << 20) {
    for (; max_frames > 0 && !to_node.empty(); --max_frames) {
      auto [rank, body] = std::move(to_node.front());
      to_node.pop_front();
      if (!memories.contains(rank)) continue;  // lost: what was sent to it is, too
      if (!is_memory_frame(body)) {
        bridge::Frame frame{.body = std::move(body), .fds = {}};
        if (next_fd[rank]) frame.fds.push_back(std::move(next_fd[rank]));
        commands[rank].push_back(decode_command(std::move(frame)));
        continue;
      }
      if (spoil) spoil(body);
      const MemoryFrame frame = decode_memory_frame(body);
      if (const auto* piece = std::get_if<MemoryPiece>(&frame)) {
        num_piece_bytes += piece->bytes.size();
        if (const auto state = memories.at(rank)->received().write(*piece)) {
          node_.handle(rank, *state);
        }
      } else if (const auto* use = std::get_if<MemoryUse>(&frame)) {
        last_use = *use;
        next_fd[rank] = memories.at(rank)->find(*use);
      } else if (const auto* end = std::get_if<MemoryEnd>(&frame)) {
        memories.at(rank)->received().drop(end->memory);
      }
    }
  }

  void lose(int32_t rank) {
    memories.erase(rank);
    node_.lose_rank(rank);
  }

  const bridge::WeightChunk& chunk_of(int32_t rank, size_t index) {
    return *std::get<StageWeights>(commands.at(rank).at(index)).chunk;
  }

  std::deque<std::pair<int32_t, std::vector<uint8_t>>> to_node;
  std::function<void(std::vector<uint8_t>&)> spoil;
  std::map<int32_t, std::unique_ptr<NodeMemory>> memories;
  std::map<int32_t, std::vector<Command>> commands;
  std::map<int32_t, OwnedFd> next_fd;
  std::map<int32_t, std::vector<Ack>> answers;
  std::map<int32_t, int> num_progress;
  size_t num_piece_bytes = 0;
  MemoryUse last_use;

 private:
  OutgoingMemories outgoing_;
  RemoteNode node_;
};

bool is_same(std::span<const std::byte> a, std::span<const std::byte> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0;
}

TEST(RemoteNode, MemoryCrossesOnceAndReachesEveryRank) {
  // Around the size of a piece, and one of many.
  for (const size_t num_bytes : {size_t{2}, kMaxPieceBytes - 2, kMaxPieceBytes, kMaxPieceBytes + 2,
                                 11 * kMaxPieceBytes + 6}) {
    Wire wire({2, 3, 5});
    const auto chunk = make_chunk(num_bytes);
    for (const int32_t rank : {2, 3, 5}) {
      wire.node().send(rank, StageWeights{static_cast<uint64_t>(100 + rank), chunk});
    }
    wire.carry();
    EXPECT_EQ(wire.num_piece_bytes, num_bytes);
    for (const int32_t rank : {2, 3, 5}) {
      ASSERT_EQ(wire.commands[rank].size(), 1u) << num_bytes;
      EXPECT_TRUE(is_same(wire.chunk_of(rank, 0).tensors.at(0).bytes, chunk->mapping));
      EXPECT_GT(wire.num_progress[rank], 0);
    }
  }
}

TEST(RemoteNode, OnlyWeightsWaitAndTheyKeepTheirOrder) {
  Wire wire({1});
  wire.node().send(1, BeginWeights{.ticket = 1});
  wire.node().send(1, StageWeights{2, make_chunk(3 * kMaxPieceBytes)});
  wire.node().send(1, FinishWeights{3});
  wire.node().send(1, DiscardWeights{});
  wire.node().send(1, Resume{});
  wire.carry();
  const std::vector<Command>& commands = wire.commands[1];
  ASSERT_EQ(commands.size(), 5u);
  EXPECT_TRUE(std::holds_alternative<BeginWeights>(commands[0]));
  EXPECT_TRUE(std::holds_alternative<Resume>(commands[1]));
  EXPECT_TRUE(std::holds_alternative<StageWeights>(commands[2]));
  EXPECT_TRUE(std::holds_alternative<FinishWeights>(commands[3]));
  EXPECT_TRUE(std::holds_alternative<DiscardWeights>(commands[4]));
}

TEST(RemoteNode, NothingButAStopOvertakesASwitch) {
  Wire wire({1});
  wire.node().send(1, StageWeights{1, make_chunk(3 * kMaxPieceBytes)});
  wire.node().send(1, CommitWeights{.ticket = 2});
  wire.node().send(1, AddGroups{});
  wire.node().send(1, Stop{});
  wire.carry();
  const std::vector<Command>& commands = wire.commands[1];
  ASSERT_EQ(commands.size(), 4u);
  EXPECT_TRUE(std::holds_alternative<Stop>(commands[0]));
  EXPECT_TRUE(std::holds_alternative<StageWeights>(commands[1]));
  EXPECT_TRUE(std::holds_alternative<CommitWeights>(commands[2]));
  EXPECT_TRUE(std::holds_alternative<AddGroups>(commands[3]));
}

TEST(RemoteNode, LittleIsUnderWayAtATime) {
  Wire wire({1});
  wire.node().send(1, StageWeights{1, make_chunk(40 * kMaxPieceBytes)});
  EXPECT_LE(wire.to_node.size(), 8u);
  wire.carry(3);
  EXPECT_LE(wire.to_node.size(), 8u);
  wire.carry();
  EXPECT_EQ(wire.commands[1].size(), 1u);
}

TEST(RemoteNode, ASpoiltPieceRefusesTheCommandOfEveryRank) {
  Wire wire({1, 2});
  int num_pieces = 0;
  wire.spoil = [&](std::vector<uint8_t>& body) {
    if (body.size() > 1000 && ++num_pieces == 2) body[900] ^= 1;
  };
  const auto chunk = make_chunk(4 * kMaxPieceBytes);
  wire.node().send(1, StageWeights{11, chunk});
  wire.node().send(2, StageWeights{12, chunk});
  wire.node().send(2, DiscardWeights{});
  wire.carry();
  for (const int32_t rank : {1, 2}) {
    ASSERT_EQ(wire.answers[rank].size(), 1u);
    EXPECT_EQ(wire.answers[rank][0].ticket, static_cast<uint64_t>(10 + rank));
    EXPECT_EQ(wire.answers[rank][0].error->code, ErrorCode::kDataLoss);
    EXPECT_NE(wire.answers[rank][0].error->message.find("crc32"), std::string::npos);
  }
  EXPECT_EQ(wire.commands[1].size(), 0u);
  EXPECT_EQ(wire.commands[2].size(), 1u) << "what comes after it goes on";
  // The same memory may be tried again.
  wire.node().send(1, StageWeights{13, chunk});
  wire.carry();
  EXPECT_EQ(wire.commands[1].size(), 1u);
}

TEST(RemoteNode, AnotherRankTakesOverFromALostHolder) {
  for (const int num_frames : {0, 1, 5, 9}) {
    Wire wire({4, 6});
    const auto chunk = make_chunk(10 * kMaxPieceBytes);
    wire.node().send(4, StageWeights{1, chunk});
    wire.node().send(6, StageWeights{2, chunk});
    wire.carry(num_frames);
    wire.lose(4);
    wire.carry();
    ASSERT_EQ(wire.commands[6].size(), 1u) << num_frames;
    EXPECT_TRUE(is_same(wire.chunk_of(6, 0).tensors.at(0).bytes, chunk->mapping));
    EXPECT_EQ(wire.last_use.holder, 6);
  }
}

TEST(RemoteNode, MemoryIsDroppedOnceAllHaveAnswered) {
  Wire wire({1, 2});
  const auto chunk = make_chunk(1000);
  wire.node().send(1, StageWeights{1, chunk});
  wire.node().send(2, StageWeights{2, chunk});
  wire.carry();
  wire.node().handle(1, Ack{.ticket = 1});
  wire.carry();
  EXPECT_TRUE(wire.memories[2]->find(wire.last_use)) << "rank 2 may yet need it";
  wire.node().handle(2, Ack{.ticket = 2});
  wire.carry();
  for (const int32_t rank : {1, 2}) {
    EXPECT_NE(testing::error_text([&] {
                wire.memories[rank]->find(wire.last_use);
              }).find("unavailable: memory"),
              std::string::npos);
  }
}

TEST(RemoteNode, NoRankLeftIsNoTrouble) {
  Wire wire({1});
  const auto chunk = make_chunk(3 * kMaxPieceBytes);
  wire.node().send(1, StageWeights{1, chunk});
  wire.carry(1);
  wire.lose(1);
  wire.node().send(1, StageWeights{2, chunk});
  wire.carry();
  EXPECT_EQ(chunk.use_count(), 1) << "nobody holds it any more";
}

TEST(NodeMemory, PiecesWithoutTheirBeginningCountForNothing) {
  NodeMemory memory(random_token(), 1);
  const std::vector<uint8_t> bytes(10, 1);
  const MemoryPiece late{.memory = 1, .total_bytes = 20, .offset = 10, .bytes = bytes, .crc = 0};
  EXPECT_FALSE(memory.received().write(late)) << "dropped before: no error, nothing kept";
  EXPECT_EQ(testing::error_text([&] { memory.find({.memory = 1, .holder = 1}); }),
            "unavailable: memory 1 of rank 1 = not there: it has been dropped");
  EXPECT_NE(testing::error_text([&] {
              memory.find({.memory = 1, .holder = 7});
            }).find("unavailable: memory 1 of rank 7"),
            std::string::npos);
}

}  // namespace
}  // namespace rollpack::rollout
