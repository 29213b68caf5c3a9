// The RolloutService of a node's bridge: asks rank 0 and hands its answers on; rank 0's journal is
// the log of its delivery. Weights come in through rank 0's bridge alone.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "rollout/node_bridge/node_messages.h"
#include "trainer_bridge/contract/rollout_service.h"

namespace rollpack::rollout {

// Thread-safe; never waits.
class NodeService final : public bridge::RolloutService, public bridge::DeliveryLog {
 public:
  // `send` never waits. `weights_place` names the bridge that takes weights, for errors.
  NodeService(std::function<void(const NodeRequest&)> send, std::string weights_place)
      : send_(std::move(send)), weights_place_(std::move(weights_place)) {}

  // What rank 0 says.
  void open(told::Open news);
  void update(told::State news);
  void answer(const told::Number& news);
  void answer(told::Scores news);
  void answer(const told::Slept& news);
  void answer(const told::Weights& news);
  void answer(told::Stats news);
  // Rank 0 is gone: everything that waits fails, and all that is asked from then on.
  void lose(const ErrorInfo& error);

  // RolloutService
  bridge::ServiceInfo info() const override;
  void submit(std::vector<bridge::PromptRequest> prompts, bridge::Answer<int64_t> done) override;
  void abort(std::optional<int64_t> request_id, bridge::Answer<int64_t> done) override;
  void pause(bridge::InFlight in_flight, bridge::OutcomeCallback done) override;
  void resume() override;
  void sleep(int level, bridge::InFlight in_flight,
             bridge::Answer<bridge::SleepState> done) override;
  void wake_up(bridge::MemoryTags tags, bridge::Answer<bridge::SleepState> done) override;
  bridge::SleepState sleep_state() const override;
  void score(std::vector<bridge::ScoreSequence> sequences,
             bridge::Answer<std::vector<bridge::ScoredSequence>> done) override;
  void begin_weights(bridge::WeightUpdate update, bridge::OutcomeCallback done) override;
  void stage_weights(bridge::WeightChunk chunk, bridge::OutcomeCallback done) override;
  bool takes_lent_weights() const override { return false; }
  void commit_weights(bridge::InFlight in_flight, bridge::OutcomeCallback done) override;
  void cancel_weights() override {}
  int64_t weight_version() const override;
  void find_weights(bridge::Answer<bridge::WeightsInUse> done) override;
  std::optional<int64_t> awaited_weight_version() const override;
  void find_stats(bridge::Answer<Numbers> done) override;
  bridge::Outcome health() const override;
  void shutdown() override { send_(asked::Shutdown{}); }

  // DeliveryLog
  void formed(std::vector<bridge::FormedBatch> batches) override {
    send_(asked::Formed{std::move(batches)});
  }
  void released(uint64_t batch_seq) override { send_(asked::Released{batch_seq}); }
  void when_durable(std::function<void(std::optional<ErrorInfo>)> done) override;

 private:
  // Who waits for an answer of one kind, by ticket.
  template <class Value>
  class Waiting {
   public:
    // Errors: would_block.
    uint64_t add(bridge::Answer<Value> done);
    void answer(uint64_t ticket, bridge::Outcome error, Value value);
    void fail_all(const ErrorInfo& error);

   private:
    std::mutex mutex_;
    uint64_t last_ = 0;
    std::map<uint64_t, bridge::Answer<Value>> waiting_;
  };

  void check_health() const;
  ErrorInfo no_weights_here() const;

  const std::function<void(const NodeRequest&)> send_;
  const std::string weights_place_;
  mutable std::mutex mutex_;  // of the next three
  bridge::ServiceInfo info_;
  told::State state_;
  bridge::Outcome lost_;
  Waiting<int64_t> numbers_;
  Waiting<std::vector<bridge::ScoredSequence>> scores_;
  Waiting<bridge::SleepState> sleeps_;
  Waiting<bridge::WeightsInUse> weights_;
  Waiting<Numbers> stats_;
};

}  // namespace rollpack::rollout
