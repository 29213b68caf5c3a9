// Rank 0's view of another node: its ranks get commands, and the memory that commands refer to goes
// there once, to one rank that gives it to the others. Commands about weights wait for their memory
// and keep their order; others go at once, unless a switch of weights before them waits. All calls
// come from one thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "rollout/cluster/memory_frames.h"
#include "rollout/cluster/messages.h"
#include "rollout/cluster/tcp_socket.h"
#include "trainer_bridge/shared_memory/segment.h"

namespace rollpack::rollout {

class RemoteNode;

// Memory on its way to other nodes, mapped and summed once for all of them. They form a chain: the
// first one gets it from rank 0, each other one from the one before it, while that gets it still.
class OutgoingMemory {
 public:
  // `owner` keeps `fd` open. Errors: those of MappedSegment::map.
  OutgoingMemory(std::shared_ptr<const void> owner, int fd);

  uint64_t number() const { return number_; }
  uint64_t num_bytes() const { return segment_.bytes().size(); }
  MemoryPiece piece(uint64_t offset);

  // `node` begins to get it, from the one that is returned; nullptr: from rank 0.
  RemoteNode* join(RemoteNode& node);
  void leave(RemoteNode& node);
  const std::vector<RemoteNode*>& chain() const { return chain_; }

 private:
  const std::shared_ptr<const void> owner_;
  const uint64_t number_;
  bridge::MappedSegment segment_;
  std::vector<std::optional<uint32_t>> sums_;  // a piece
  std::vector<RemoteNode*> chain_;
};

// By what commands point to; forgotten with its last user.
class OutgoingMemories {
 public:
  // Errors: those of OutgoingMemory.
  std::shared_ptr<OutgoingMemory> of(const std::shared_ptr<const void>& owner, int fd);

 private:
  std::map<const void*, std::weak_ptr<OutgoingMemory>> all_;
};

class RemoteNode {
 public:
  struct Actions {
    std::function<void(int32_t rank, std::vector<uint8_t> body)> transmit;
    // The rank waits for memory, and more of it has come.
    std::function<void(int32_t rank)> tell_progress;
    // In the rank's stead: its command's memory cannot be had.
    std::function<void(int32_t rank, Ack)> answer;
  };
  RemoteNode(Actions actions, OutgoingMemories& memories, int number);

  int number() const { return number_; }

  // `relay` is where it takes memory from other ranks; port 0: nowhere.
  void add_rank(int32_t rank, TcpEndpoint relay = {}) { ranks_[rank].relay = std::move(relay); }
  // It is gone: another rank takes over what it held.
  void lose_rank(int32_t rank);
  void send(int32_t rank, Command command);
  // What a rank has said.
  void handle(int32_t rank, const MemoryState& state);
  void handle(int32_t rank, const Ack& ack);

  // Gets from rank 0 what has not come from another node for `limit`.
  void check_feeder(std::chrono::steady_clock::time_point now, std::chrono::milliseconds limit);

 private:
  struct Waiting {
    Command command;
    uint64_t memory = 0;  // 0: none
  };
  struct Rank {
    std::deque<Waiting> waiting;
    TcpEndpoint relay;
    std::map<uint64_t, uint64_t> uses;  // memory by the ticket of a command under way

    bool has_switch_waiting() const;
  };
  struct Transfer {
    std::shared_ptr<OutgoingMemory> memory;
    int64_t num_users = 0;          // commands that are not answered yet
    std::optional<int32_t> holder;  // the rank that has it, or gets it
    uint64_t num_sent = 0, num_arrived = 0;
    RemoteNode* feeder = nullptr;  // sends it, in rank 0's stead
    std::chrono::steady_clock::time_point last_progress;
    std::optional<ErrorInfo> error;

    bool has_arrived() const { return holder && num_arrived == memory->num_bytes(); }
  };

  uint64_t use_memory(const Command& command);
  void release(uint64_t memory);
  void forward(int32_t rank);
  void forward_all();
  void transmit(int32_t rank, const Command& command);
  void pump();
  void begin(Transfer& transfer);
  bool feed(uint64_t memory, int32_t rank, const TcpEndpoint& endpoint);
  void restart(Transfer& transfer);
  void lose_feeder(const RemoteNode& feeder);
  void forget(Transfer& transfer);
  bool is_awaited(uint64_t memory) const;
  void fail(uint64_t memory, ErrorInfo error);

  const Actions actions_;
  OutgoingMemories& memories_;
  const int number_;
  std::map<int32_t, Rank> ranks_;
  std::map<uint64_t, Transfer> transfers_;
  std::deque<uint64_t> queue_;  // not arrived yet, one after the other
  bool can_be_fed_ = true;      // nothing has failed to come from another node
};

}  // namespace rollpack::rollout
