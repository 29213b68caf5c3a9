// Links between rank 0 and the workers of other ranks: a Unix or TCP socket each, frames of
// message_codec. Rank 0 serves all of them from one thread. A death is noticed by the end of the
// socket or of the process (pidfd), whichever comes first; a process that only stands still, and a
// host that was cut off, by the dispatcher's leases, which are checked here.
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "rollout/cluster/dispatcher.h"
#include "rollout/cluster/memory_relay.h"
#include "rollout/cluster/node_memory.h"
#include "rollout/cluster/rank_acceptor.h"
#include "rollout/cluster/remote_node.h"
#include "trainer_bridge/wire/frame_socket.h"

namespace rollpack::rollout {

// Rank 0's end of all links.
class RankHub {
 public:
  struct Options {
    int num_ranks = 1;              // those of this node's are numbered with all others
    int num_ranks_on_node = 1;      // share this machine's CPUs, replacements too
    std::vector<int> node_of_rank;  // by rank; empty: all on rank 0's
    bool may_miss = false;          // ranks that did not come are lost; otherwise that is an error
    std::chrono::milliseconds lease{30000};
    std::function<void()> on_lost_host;  // a rank of another node is lost; the hub's thread
  };
  // `ranks` have been accepted. Errors: deadline_exceeded naming how many are missing.
  RankHub(std::vector<AcceptedRank> ranks, Options options);
  ~RankHub();

  // Makes ranks 1 to num_ranks - 1 workers of `dispatcher`, in rank order, then serves them.
  void serve(Dispatcher& dispatcher);

  // What ranks say of their nodes' bridges goes to `hear`, on the hub's thread; Errors it throws
  // end the link. Before serve().
  void set_on_node_frame(std::function<void(int32_t worker, std::vector<uint8_t> frame)> hear) {
    hear_node_ = std::move(hear);
  }
  // Any thread, after serve(); in the order of the calls.
  void send_node_frame(int32_t worker, std::vector<uint8_t> frame);
  // Where a rank takes samples from other ranks; port 0: nowhere. The hub's thread.
  TcpEndpoint endpoint_of(int32_t worker) const;
  // Done as often as leases are looked at, on the hub's thread. Before serve().
  void set_on_lease_check(std::function<void()> check) { on_lease_check_ = std::move(check); }
  // Does it on the hub's thread. Any thread.
  void post(std::function<void()> task) { bridge::asio::post(io_, std::move(task)); }

  // Starts one more worker process on this node, which joins `dispatcher`; any thread, after
  // serve(). `line` is what ranks are told when they meet. It takes the place of this node's rank
  // `rank_on_node`.
  void start_replacement(Dispatcher& dispatcher, int rank_on_node, const std::string& line);

 private:
  class Link;
  int rank_on_first_node(int rank) const;
  class NoLink;

  void watch_leases(Dispatcher& dispatcher, std::chrono::milliseconds period);
  RemoteNode& remote_node(Dispatcher& dispatcher, int node);

  const Options options_;
  std::vector<AcceptedRank> ranks_;  // until they are served
  bridge::asio::io_context io_;
  bridge::asio::steady_timer lease_timer_{io_};
  OutgoingMemories outgoing_;
  std::map<int, std::unique_ptr<RemoteNode>> nodes_;  // but rank 0's
  std::vector<std::shared_ptr<Link>> links_;          // by rank
  std::function<void(int32_t worker, std::vector<uint8_t> frame)> hear_node_;
  std::function<void()> on_lease_check_;
  std::thread thread_;
};

// A worker rank's end of its link. Memory that rank 0 sends to this node comes through it too, and
// reaches commands as a descriptor, wherever it came from.
class RankClient {
 public:
  // Over a socket to rank 0 on the same node.
  explicit RankClient(bridge::OwnedFd socket) : socket_(std::move(socket)) {}
  // Over a TCP connection; `memory` is this rank's.
  RankClient(bridge::OwnedFd socket, std::unique_ptr<NodeMemory> memory)
      : socket_(std::move(socket)), memory_(std::move(memory)) {}
  // What rank 0 says to this node's bridge goes to `hear`, from receive().
  void set_on_node_frame(std::function<void(std::vector<uint8_t> frame)> hear) {
    hear_node_ = std::move(hear);
  }
  void send_node_frame(std::vector<uint8_t> frame) { send_body(std::move(frame)); }
  // Memory may also come from other ranks, and go on to others.
  void relay(TcpListener listener, const Meeting& meeting, std::chrono::milliseconds limit);
  // Ranks of other nodes may bring samples for this node's bridge; where nobody can connect to this
  // rank none does.
  void set_take_samples(MemoryRelay::TakeSamples take) {
    if (relay_) relay_->set_take_samples(std::move(take));
  }

  void send(const Event& event);  // thread-safe; waits while the socket is full
  // The next command; nullopt when rank 0 is gone.
  // Errors: those of a broken connection.
  std::optional<Command> receive();

 private:
  void send_body(std::vector<uint8_t> body);
  void take(const MemoryFrame& frame);

  const bridge::OwnedFd socket_;
  const std::unique_ptr<NodeMemory> memory_;
  std::unique_ptr<MemoryRelay> relay_;
  std::function<void(std::vector<uint8_t> frame)> hear_node_;
  std::optional<bridge::OwnedFd> next_fd_;  // of the next command
  bridge::Outcome next_error_;              // why it has none
  std::mutex send_mutex_;
};

}  // namespace rollpack::rollout
