// Nodes as threads: rank 0 on node 0, ranks 1 and 2 on node 1, whose bridge rank 1 holds, and rank
// 3 on node 2, where a test wants one. Frames and messages between the nodes go through their
// codecs, each way on a thread of its own; what rank 3 makes for node 1 goes by TCP.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "rollout/cluster/meeting.h"
#include "rollout/cluster/memory_relay.h"
#include "rollout/cluster/message_codec.h"
#include "rollout/node_bridge/node_bridge.h"
#include "rollout/node_bridge/node_desk.h"
#include "rollout/node_bridge/sample_frame.h"
#include "rollout/node_bridge/sample_way.h"
#include "rollout/node_bridge/server_options.h"
#include "tests/rollout/cluster/thread_ranks.h"
#include "tests/rollout/temporary_folder.h"
#include "tests/trainer_bridge/server/test_client.h"

namespace rollpack::rollout {

class ThreadNodes {
 public:
  static constexpr int32_t kHolder = 1, kOther = 2, kThird = 3;

  // `journal`: its file; none without it.
  explicit ThreadNodes(const std::string& journal = "", int num_nodes = 2)
      : config_(config_in(folder_.path())) {
    const int num_ranks = num_nodes + 1;
    for (int rank = 0; rank < num_ranks; ++rank) replicas_.push_back(tiny_replica(config_));
    Replica& first = *replicas_[0];
    dispatcher_ = std::make_unique<Dispatcher>(
        config_, first.model(), first.limits(), first.backend().info().fingerprint,
        first.backend().weights_hash(), /*shares_weights=*/false, RecoveryOptions{.is_on = true});
    desk_ = std::make_unique<NodeDesk>(
        *dispatcher_, sink, std::vector<int32_t>{kHolder},
        NodeDesk::Ways{
            .send =
                [this](int32_t worker, std::vector<uint8_t> frame) {
                  worker == kThird ? to_third(frame) : to_node(std::move(frame));
                },
            .later =
                [this](std::function<void()> task) { bridge::asio::post(hub_, std::move(task)); },
            .node_of = [](int32_t worker) { return (worker + 1) / 2; },
            .endpoint_of = [this](int32_t) { return endpoint_; }});
    dispatcher_->set_sink(*desk_);
    dispatcher_->set_kept_samples(*desk_);
    dispatcher_->set_on_change([this] { desk_->tell_state(); });
    bridge_ = std::make_unique<NodeBridge>(
        config_, first.model().written_pad_id(),
        NodeBridge::Place{
            .job = folder_.path(), .rank = kHolder, .weights_place = "node 0's bridge"},
        [this](std::vector<uint8_t> frame) { to_rank_0(std::move(frame)); });
    const auto tell = [this](int32_t rank) {
      return [this, rank](const Event& event) {
        const bool is_mute = (rank == kOther && other_is_mute) || (rank == kThird && third_is_mute);
        if (is_mute && std::holds_alternative<SampleKept>(event)) return;
        if (rank == kThird && std::holds_alternative<SampleDone>(event)) ++num_detours;
        dispatcher_->handle(rank, decode_event(encode(event)));
      };
    };
    ways_.emplace_back(1, *bridge_, tell(kHolder));
    ways_.emplace_back(
        1, kOther, std::make_unique<SampleOutlet>(folder_.path(), kHolder, std::chrono::seconds(5)),
        tell(kOther));
    if (num_nodes > 2) add_third(tell(kThird));
    if (!journal.empty()) {
      journal_ = Journal::open(journal, "these threads", /*num_nodes=*/2);
      desk_->set_journal(*journal_);
      dispatcher_->restore(*journal_, journal_->restored_requests());
    }
    for (int32_t rank = 0; rank < num_ranks; ++rank) {
      workers_.push_back(std::make_shared<Worker>(*replicas_[rank], [this, rank](Event event) {
        if (rank == 0) return dispatcher_->handle(0, std::move(event));
        ways_[rank - 1].send(std::move(event));
      }));
      if (rank == 0) {
        dispatcher_->add_worker(workers_[0]);
      } else {
        dispatcher_->add_worker(std::make_shared<Link>(workers_[rank], ways_[rank - 1]));
      }
    }
    for (const auto& worker : workers_) worker->start();
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    dispatcher_->wait_ready(deadline);
    desk_->open(deadline);
    if (!third_) return;
    // Where the bridge is, it knows before its first sample.
    third_->expect(1);
    std::promise<void> answered;
    bridge::asio::post(hub_, [&] { answered.set_value(); });
    answered.get_future().wait();
  }
  ~ThreadNodes() {
    dispatcher_->stop(false, std::chrono::steady_clock::now() + std::chrono::seconds(30));
    for (const auto& worker : workers_) worker->stop();
    third_.reset();
    relay_.reset();
    bridge_->stop();
    dispatcher_->forget_log();
    desk_->forget_journal();
    journal_.reset();  // its thread answers by the hub's
    for (bridge::asio::thread_pool* pool : {&hub_, &node_}) {
      pool->stop();
      pool->join();
    }
  }

  static Config config_in(const std::string& folder) {
    Config config = tiny_config();
    config.bridge.endpoints = "per_node";
    config.bridge.socket = folder + "/bridge.sock";
    config.bridge.slot_bytes = 1 << 20;
    return config;
  }

  // Nobody reaches node 1 from node 2 any more.
  void cut() { relay_.reset(); }
  Dispatcher& dispatcher() { return *dispatcher_; }
  NodeDesk& desk() { return *desk_; }
  NodeBridge& node_bridge() { return *bridge_; }
  const Config& config() const { return config_; }
  bridge::TestClient trainer() { return bridge::TestClient(config_.bridge.socket); }
  double number(const std::string& name) {
    for (const auto& [known, value] : desk_->numbers()) {
      if (known == name) return value;
    }
    for (const auto& [known, value] : dispatcher_->stats()) {
      if (known == name) return value;
    }
    ADD_FAILURE() << "no number " << name;
    return -1;
  }

  KeepingSink sink;  // of node 0
  // Ranks 2 and 3 die before they say what they have handed over.
  std::atomic<bool> other_is_mute = false, third_is_mute = false;
  std::atomic<int64_t> num_detours = 0;  // samples of rank 3 that came to rank 0
  std::atomic<int64_t> num_sample_bytes_to_node = 0;

 private:
  class Link : public WorkerLink {
   public:
    Link(std::shared_ptr<Worker> worker, const SampleWay& way)
        : worker_(std::move(worker)), way_(way) {}
    void send(Command command) override {
      Command received = decode_command(encode(command));
      way_.expect(received);
      worker_->send(std::move(received));
    }
    bool is_own_process() const override { return true; }
    int node() const override { return way_.node(); }

   private:
    std::shared_ptr<Worker> worker_;
    const SampleWay& way_;
  };

  void add_third(SampleWay::TellRank0 tell) {
    TcpListener listener = listen_tcp({.interface = "lo"});
    endpoint_ = listener.endpoint;
    const std::string token = random_token(), answer = random_token();
    relay_ = std::make_unique<MemoryRelay>(
        memory_, std::move(listener),
        MemoryRelay::Options{.token = token, .reply = answer, .answer = [](auto) {}});
    relay_->set_take_samples([this](int32_t worker, bridge::OwnedFd socket) {
      bridge_->admit(worker, std::move(socket));
    });
    third_ = std::make_unique<StraightWay>(
        StraightWay::Options{
            .rank = kThird, .token = token, .answer = answer, .limit = std::chrono::seconds(5)},
        StraightWay::Ways{.tell = tell, .find = [this](const NodeRequest& request) {
                            bridge::asio::post(hub_, [this, frame = encode(request)] {
                              desk_->handle(kThird, frame);
                            });
                          }});
    ways_.emplace_back(2, kThird,
                       std::make_unique<SampleOutlet>("no bridge", kThird, std::chrono::seconds(1)),
                       tell);
    ways_.back().set_straight_way(*third_);
  }
  void to_third(const std::vector<uint8_t>& frame) {
    const NodeNews news = decode_node_news(frame);
    if (const auto* bridge = std::get_if<told::BridgeAt>(&news)) third_->found(*bridge);
  }

  void to_node(std::vector<uint8_t> frame) {
    if (is_sample_frame(frame)) num_sample_bytes_to_node += static_cast<int64_t>(frame.size());
    bridge::asio::post(
        node_, [this, frame = std::move(frame)]() mutable { bridge_->handle(std::move(frame)); });
  }
  void to_rank_0(std::vector<uint8_t> frame) {
    bridge::asio::post(hub_, [this, frame = std::move(frame)]() mutable {
      desk_->handle(kHolder, std::move(frame));
    });
  }

  testing::TemporaryFolder folder_;
  const Config config_;
  std::vector<std::unique_ptr<Replica>> replicas_;
  std::unique_ptr<Dispatcher> dispatcher_;
  std::unique_ptr<Journal> journal_;
  std::unique_ptr<NodeDesk> desk_;
  bridge::asio::thread_pool hub_{1}, node_{1};
  std::unique_ptr<NodeBridge> bridge_;
  ReceivedMemory memory_;
  TcpEndpoint endpoint_;
  std::unique_ptr<MemoryRelay> relay_;
  std::unique_ptr<StraightWay> third_;
  std::deque<SampleWay> ways_;
  std::vector<std::shared_ptr<Worker>> workers_;
};

}  // namespace rollpack::rollout
