// The bridge of a node other than rank 0's, in the node's lowest rank: a server with slots and a
// delivery of its own, which asks rank 0 for what its trainers ask for and gets the samples from
// there, or from the ranks beside it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "rollout/config/config.h"
#include "rollout/node_bridge/kept_store.h"
#include "rollout/node_bridge/node_messages.h"
#include "rollout/node_bridge/node_service.h"
#include "rollout/node_bridge/sample_inlet.h"
#include "trainer_bridge/server/server.h"
#include "trainer_bridge/wire/asio.h"

namespace rollpack::rollout {

class NodeBridge {
 public:
  struct Place {
    std::string job;  // a random text that all ranks of the job have in common
    int rank = 0;
    std::string weights_place;  // where weights are sent to, for errors
  };
  // Takes the socket's lock and the slots' memory; clients may come once rank 0 says so.
  // `send` takes frames to rank 0 and may wait. Errors: those of Server and SampleInlet.
  NodeBridge(const Config& config, int32_t pad_token_id, const Place& place,
             std::function<void(std::vector<uint8_t>)> send);
  // Stops.
  ~NodeBridge();

  // Where other bridges are, which rank 0 tells this rank, goes to `hear`. Before the first frame.
  void set_on_bridge_at(std::function<void(const told::BridgeAt&)> hear) {
    hear_bridge_at_ = std::move(hear);
  }

  // A frame of rank 0's. Errors: data_loss.
  void handle(std::vector<uint8_t> frame);
  // A rank of another node has connected to bring samples, and is known. Any thread.
  void admit(int32_t worker, bridge::OwnedFd socket) { inlet_.admit(worker, std::move(socket)); }
  // A sample of this rank's own.
  void keep(int32_t attempt, bridge::Sample sample);
  // Nothing more comes from rank 0, for this reason where it is none of its own will: clients that
  // wait are told.
  void stop(const bridge::Outcome& error = std::nullopt);

 private:
  void send(const NodeRequest& request);
  void on_news(told::State& news);
  void on_news(told::Open& news);
  void on_news(told::Number& news) { service_.answer(news); }
  void on_news(told::Scores& news) { service_.answer(std::move(news)); }
  void on_news(told::Slept& news) { service_.answer(news); }
  void on_news(told::Weights& news) { service_.answer(news); }
  void on_news(told::Stats& news);
  void on_news(told::Failed& news) { server_.fail(std::move(news.sample)); }
  void on_news(told::Decided& news) {
    store_.decide(news.worker, news.key, news.attempt, news.verdict);
  }
  void on_news(told::Forgotten& news) { store_.forget(news.worker); }
  void on_news(told::Ping& news);
  void on_news(told::BridgeAt& news) {
    if (hear_bridge_at_) hear_bridge_at_(news);
  }

  const int rank_;
  const std::function<void(std::vector<uint8_t>)> send_;
  std::function<void(const told::BridgeAt&)> hear_bridge_at_;
  bridge::asio::thread_pool sender_{1};  // the server's thread never waits for the link
  NodeService service_;
  bridge::Server server_;
  KeptStore store_;
  SampleInlet inlet_;
  size_t num_bytes_received_ = 0;  // not told to rank 0 yet
};

}  // namespace rollpack::rollout
