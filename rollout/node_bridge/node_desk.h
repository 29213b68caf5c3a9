// Rank 0's end of other nodes' bridges: their requests go to the dispatcher, their samples to them.
// One node's bridge, or its trainer, keeps no other waiting: what it has not taken stays here,
// apart from what others get, and the more of that there is, the less it may ask for.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

#include "rollout/cluster/dispatcher.h"
#include "rollout/cluster/kept_samples.h"
#include "rollout/cluster/tcp_socket.h"
#include "rollout/journal/journal.h"
#include "rollout/node_bridge/node_messages.h"
#include "trainer_bridge/contract/sample_sink.h"

namespace rollpack::rollout {

// Thread-safe.
class NodeDesk final : public bridge::SampleSink, public KeptSamples {
 public:
  struct Ways {
    // Frames for the node's bridge, in order. Never waits.
    std::function<void(int32_t worker, std::vector<uint8_t> frame)> send;
    // Does something a little later, on a thread that holds no locks.
    std::function<void(std::function<void()>)> later;
    // Where a worker runs, and where it takes samples from other ranks (port 0: nowhere).
    std::function<int32_t(int32_t worker)> node_of;
    std::function<TcpEndpoint(int32_t worker)> endpoint_of;
  };
  // Samples of rank 0's own node go to `own`. `bridges`: the worker that holds each node's bridge,
  // by node, from node 1 on. All of them outlive this.
  NodeDesk(Dispatcher& dispatcher, bridge::SampleSink& own, std::vector<int32_t> bridges,
           Ways ways);

  // What the bridges' deliveries write down goes there. Before open(); it outlives the last frame.
  void set_journal(Journal& journal) { journal_ = &journal; }
  // The journal may go before this.
  void forget_journal();
  // All ranks are ready: has the bridges take clients, and waits until they do.
  // Errors: deadline_exceeded naming those that do not.
  void open(std::chrono::steady_clock::time_point deadline);
  // A frame from the worker that holds a node's bridge, or that asks for one. Errors: data_loss.
  void handle(int32_t worker, std::vector<uint8_t> frame);
  // Asks bridges whether they are there, and gives up those that have not answered for a lease. To
  // be called several times a lease: a call that comes late renews all leases.
  void check_bridges(std::chrono::steady_clock::time_point now, std::chrono::milliseconds lease);
  // The dispatcher has changed: tells all.
  void tell_state();

  void commit(bridge::Sample sample) override;
  void fail(bridge::FailedSample sample) override;
  void decide(int32_t worker, const bridge::SampleKey& key, int32_t attempt,
              Verdict verdict) override;
  void forget(int32_t worker) override;

  // Counters and gauges, by name.
  bridge::RolloutService::Numbers numbers() const override;

 private:
  struct Node {
    int32_t worker = 0;
    bool is_open = false;
    bool is_gone = false;
    std::deque<std::vector<uint8_t>> waiting;           // samples
    size_t num_bytes_under_way = 0;                     // sent, and not said to have come
    bool owes_answer = false;                           // to a ping
    std::chrono::steady_clock::time_point last_change;  // of that

    bool is_there() const { return is_open && !is_gone; }
  };

  void send_sample(int32_t node, std::vector<uint8_t> frame);
  void pump(Node& node);
  void check_room(const Node& node) const;
  void lose(int32_t node);
  void tell_place(int32_t worker, int32_t node);
  told::State state() const;
  void tell(int32_t node, const NodeNews& news);
  void on_request(int32_t node, asked::Opened& request);
  void on_request(int32_t node, asked::Submit& request);
  void on_request(int32_t node, asked::Abort& request);
  void on_request(int32_t node, asked::Pause& request);
  void on_request(int32_t node, asked::Resume& request);
  void on_request(int32_t node, asked::Sleep& request);
  void on_request(int32_t node, asked::WakeUp& request);
  bridge::Answer<bridge::SleepState> tell_slept(int32_t node, uint64_t ticket);
  void on_request(int32_t node, asked::Score& request);
  void on_request(int32_t node, asked::FindWeights& request);
  void on_request(int32_t node, asked::FindStats& request);
  void on_request(int32_t node, asked::Shutdown& request);
  void on_request(int32_t node, asked::Present& request);
  void on_request(int32_t, asked::FindBridge&) {}  // answered to any rank
  void on_request(int32_t node, asked::Received& request);
  void on_request(int32_t node, asked::Formed& request);
  void on_request(int32_t node, asked::Released& request);
  void on_request(int32_t node, asked::WhenDurable& request);

  Dispatcher& dispatcher_;
  bridge::SampleSink& own_;
  const Ways ways_;
  // Taken under the dispatcher's lock too, so nothing that asks the dispatcher is done under it.
  mutable std::mutex mutex_;
  Journal* journal_ = nullptr;
  std::condition_variable changed_;
  std::map<int32_t, Node> nodes_;
  std::map<int32_t, int32_t> held_by_;  // node by the worker that holds its bridge; never changes
  std::chrono::steady_clock::time_point last_check_;
  int64_t num_samples_sent_ = 0, num_samples_kept_ = 0, num_samples_straight_ = 0;
  int64_t num_undeliverable_ = 0;
};

}  // namespace rollpack::rollout
