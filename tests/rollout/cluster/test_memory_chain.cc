// Memory that goes from node to node over real connections: rank 0 sends it once, and what is lost
// or stands still in the middle of the chain costs time only. Nodes of one rank each.
#include <gtest/gtest.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>

#include "rollout/cluster/meeting.h"
#include "rollout/cluster/memory_relay.h"
#include "rollout/cluster/message_codec.h"
#include "rollout/cluster/node_memory.h"
#include "rollout/cluster/remote_node.h"
#include "tests/rollout/cluster/memory_chunk.h"
#include "tests/sanitized.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

// Ranks 1 to n, each a node; what they tell rank 0 waits in a queue until the test lets it in.
class Chain {
 public:
  explicit Chain(int num_nodes) {
    const std::string job = random_token();
    for (int32_t rank = 1; rank <= num_nodes; ++rank) {
      TcpListener listener = listen_tcp({.interface = "lo"});
      const TcpEndpoint endpoint = listener.endpoint;
      Place& place = places_[rank];
      place.memory = std::make_unique<NodeMemory>(job, rank);
      place.relay = std::make_unique<MemoryRelay>(
          place.memory->received(), std::move(listener),
          MemoryRelay::Options{.token = token_, .limit = 5s, .answer = [this, rank](auto state) {
                                 say(rank, std::move(state));
                               }});
      place.node = std::make_unique<RemoteNode>(
          RemoteNode::Actions{
              .transmit = [this](int32_t to, std::vector<uint8_t> body) { transmit(to, body); },
              .tell_progress = [](int32_t) {},
              .answer = [](int32_t, const Ack& ack) { FAIL() << format_error(*ack.error); }},
          outgoing_, rank);
      place.node->add_rank(rank, endpoint);
    }
  }
  // Relays first: they use what others have.
  ~Chain() {
    for (auto& [rank, place] : places_) place.relay.reset();
  }

  void stage(const std::shared_ptr<const bridge::WeightChunk>& chunk) {
    for (auto& [rank, place] : places_) place.node->send(rank, StageWeights{num_tickets_++, chunk});
  }

  // Rank 0 listens until every node but the lost has a command, or for `limit`.
  bool run(std::chrono::milliseconds limit = 20s, std::chrono::milliseconds feeder_limit = 10s) {
    const auto deadline = Clock::now() + limit;
    while (!is_done() && Clock::now() < deadline) {
      for (auto& [rank, place] : places_) place.node->check_feeder(Clock::now(), feeder_limit);
      std::unique_lock lock(mutex_);
      if (!said_.wait_for(lock, 20ms, [&] { return !states_.empty(); })) continue;
      auto [rank, state] = std::move(states_.front());
      states_.pop_front();
      lock.unlock();
      if (places_.contains(rank)) places_.at(rank).node->handle(rank, state);
    }
    return is_done();
  }

  void lose(int32_t rank) {
    places_.at(rank).node->lose_rank(rank);
    lost_nodes_.push_back(std::move(places_.at(rank).node));  // rank 0 keeps it
    places_.erase(rank);
  }
  // It takes what comes to it, and passes nothing on.
  void stop_relaying(int32_t rank) { silent_.insert(rank); }

  const bridge::WeightChunk& chunk_of(int32_t rank) {
    return *std::get<StageWeights>(places_.at(rank).commands.at(0)).chunk;
  }
  std::map<int32_t, uint64_t> num_bytes_from_rank_0;

 private:
  struct Place {
    std::unique_ptr<NodeMemory> memory;
    std::unique_ptr<MemoryRelay> relay;
    std::unique_ptr<RemoteNode> node;
    std::vector<Command> commands;
    bridge::OwnedFd next_fd;
  };

  bool is_done() const {
    return std::ranges::none_of(places_,
                                [](const auto& each) { return each.second.commands.empty(); });
  }
  void say(int32_t rank, MemoryState state) {
    {
      const std::lock_guard lock(mutex_);
      states_.emplace_back(rank, std::move(state));
    }
    said_.notify_one();
  }
  // As a rank's main thread takes it.
  void transmit(int32_t rank, const std::vector<uint8_t>& body) {
    if (!places_.contains(rank)) return;
    Place& place = places_.at(rank);
    if (!is_memory_frame(body)) {
      bridge::Frame frame{.body = body, .fds = {}};
      if (place.next_fd) frame.fds.push_back(std::move(place.next_fd));
      place.commands.push_back(decode_command(std::move(frame)));
      return;
    }
    const MemoryFrame frame = decode_memory_frame(body);
    if (const auto* piece = std::get_if<MemoryPiece>(&frame)) {
      num_bytes_from_rank_0[rank] += piece->bytes.size();
      if (auto state = place.memory->received().write(*piece)) say(rank, std::move(*state));
    } else if (const auto* use = std::get_if<MemoryUse>(&frame)) {
      place.next_fd = place.memory->find(*use);
    } else if (const auto* end = std::get_if<MemoryEnd>(&frame)) {
      place.memory->received().drop(end->memory);
    } else if (const auto* order = std::get_if<MemoryForward>(&frame)) {
      if (!silent_.contains(rank)) place.relay->forward(*order);
    }
  }

  const std::string token_ = random_token();
  OutgoingMemories outgoing_;
  std::vector<std::unique_ptr<RemoteNode>> lost_nodes_;
  std::map<int32_t, Place> places_;
  std::set<int32_t> silent_;
  uint64_t num_tickets_ = 1;
  std::mutex mutex_;
  std::condition_variable said_;
  std::deque<std::pair<int32_t, MemoryState>> states_;
};

void expect_same(Chain& chain, const std::vector<int32_t>& ranks,
                 const bridge::WeightChunk& chunk) {
  for (const int32_t rank : ranks) {
    const auto& got = chain.chunk_of(rank).tensors.at(0).bytes;
    ASSERT_EQ(got.size(), chunk.mapping.size());
    EXPECT_EQ(std::memcmp(got.data(), chunk.mapping.data(), got.size()), 0) << "rank " << rank;
  }
}

// More than connections hold by themselves.
constexpr size_t kManyPieces = kIsSanitized ? 12 : 30;

TEST(MemoryChain, Rank0SendsOnce) {
  for (const size_t num_bytes : {size_t{10}, kManyPieces * kMaxPieceBytes + 2}) {
    Chain chain(4);
    const auto chunk = make_chunk(num_bytes);
    chain.stage(chunk);
    ASSERT_TRUE(chain.run());
    expect_same(chain, {1, 2, 3, 4}, *chunk);
    EXPECT_EQ(chain.num_bytes_from_rank_0[1], num_bytes);
    EXPECT_EQ(chain.num_bytes_from_rank_0.size(), 1u);
  }
}

TEST(MemoryChain, ALostLinkOfTheChainIsMadeGoodByRank0) {
  for (const int32_t lost : {1, 2, 3}) {
    Chain chain(3);
    const auto chunk = make_chunk(kManyPieces * kMaxPieceBytes);
    chain.stage(chunk);
    chain.run(/*limit=*/5ms);  // some of it has come, here and there
    std::vector<int32_t> rest = {1, 2, 3};
    std::erase(rest, lost);
    chain.lose(lost);
    ASSERT_TRUE(chain.run()) << lost;
    expect_same(chain, rest, *chunk);
  }
}

TEST(MemoryChain, WhoPassesNothingOnIsPassedOver) {
  Chain chain(3);
  chain.stop_relaying(1);
  const auto chunk = make_chunk(20 * kMaxPieceBytes);
  chain.stage(chunk);
  EXPECT_FALSE(chain.run(/*limit=*/200ms)) << "nothing comes to the second node";
  ASSERT_TRUE(chain.run(20s, /*feeder_limit=*/100ms));
  expect_same(chain, {1, 2, 3}, *chunk);
  EXPECT_EQ(chain.num_bytes_from_rank_0[2], chunk->mapping.size());
}

TEST(ReceivedMemory, PiecesOfAReplacedSourceCountForNothing) {
  const auto chunk = make_chunk(3 * kMaxPieceBytes);
  OutgoingMemory outgoing(chunk, chunk->fd);
  ReceivedMemory memory;
  const auto piece = [&](int index) {
    return outgoing.piece(static_cast<uint64_t>(index) * kMaxPieceBytes);
  };
  EXPECT_EQ(memory.write(piece(0), 7)->num_bytes, kMaxPieceBytes);
  EXPECT_EQ(memory.write(piece(1), 7)->num_bytes, 2 * kMaxPieceBytes);
  EXPECT_EQ(memory.write(piece(0))->num_bytes, kMaxPieceBytes) << "rank 0 begins anew";
  EXPECT_FALSE(memory.write(piece(2), 7)) << "the one before goes on, unheard";
  EXPECT_FALSE(memory.write(piece(0), 8)) << "nobody takes over from rank 0";
  EXPECT_EQ(memory.write(piece(1))->num_bytes, 2 * kMaxPieceBytes);
  EXPECT_EQ(memory.write(piece(2))->num_bytes, 3 * kMaxPieceBytes);
  EXPECT_EQ(memory.write(piece(0), 8)->num_bytes, 3 * kMaxPieceBytes) << "all of it is there";
  EXPECT_TRUE(memory.copy_of(outgoing.number()));
}

}  // namespace
}  // namespace rollpack::rollout
