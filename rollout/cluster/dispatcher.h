// Rank 0's dispatcher: takes requests, hands whole groups to workers that ask for work, commits
// what comes back, and switches weights on all workers or on none. The RolloutService of the
// bridge. All methods are thread-safe and none blocks but wait_ready() and stop().
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "rollout/cluster/ledger.h"
#include "rollout/cluster/messages.h"
#include "rollout/config/config.h"
#include "rollout/engine/engine_state.h"
#include "rollout/model/model_config.h"
#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/contract/sample_sink.h"

namespace rollpack::rollout {

class Dispatcher : public bridge::RolloutService {
 public:
  // `limits` and `fingerprint` are those of rank 0's replica; every worker has the same.
  // `shares_weights`: worker 0 packs updates and the others adopt its set.
  Dispatcher(const Config& config, const ModelConfig& model, const EngineLimits& limits,
             std::string fingerprint, bool shares_weights);

  void set_sink(bridge::SampleSink& sink) { sink_ = &sink; }
  // Called once, from any thread, when shutdown() is asked for or a worker is lost.
  void set_on_end(std::function<void()> on_end) { on_end_ = std::move(on_end); }

  // Workers: number them from 0 in the order of the calls, then feed their events.
  int32_t add_worker(std::shared_ptr<WorkerLink> link);
  void handle(int32_t worker, Event event);
  // Sends the packed set that worker 0 has committed to all others, as version 0.
  void share_first_weights(bridge::OwnedFd fd);
  // The link broke: ends the job, naming the rank.
  void lose_worker(int32_t worker, ErrorInfo error);
  // Errors: deadline_exceeded naming the ranks that are not ready; or what a rank reported.
  void wait_ready(std::chrono::steady_clock::time_point deadline);
  // Stops all workers; with hand_back open samples reach the sink as partial samples first.
  void stop(bool hand_back, std::chrono::steady_clock::time_point deadline);

  // Fixed-length groups of a benchmark; sampling and limits as given. Returns the request id.
  int64_t submit_groups(std::vector<GroupRequest> groups);

  // Measuring, for benchmarks: every worker schedules by `batching` from now on ("": as before) and
  // measures its steps; take_measurement() sums what all of them measured since it was last called.
  void measure(const std::string& batching, bridge::OutcomeCallback done);
  using MeasurementCallback = std::function<void(bridge::Outcome, Measurement)>;
  void take_measurement(MeasurementCallback done);

  // RolloutService
  bridge::ServiceInfo info() const override;
  int64_t submit(std::vector<bridge::PromptRequest> prompts) override;
  int64_t abort(std::optional<int64_t> request_id) override;
  void pause(bridge::InFlight in_flight, bridge::OutcomeCallback done) override;
  void resume() override;
  void score(
      std::vector<bridge::ScoreSequence> sequences,
      std::function<void(bridge::Outcome, std::vector<bridge::ScoredSequence>)> done) override;
  void begin_weights(bridge::WeightUpdate update, bridge::OutcomeCallback done) override;
  void stage_weights(bridge::WeightChunk chunk, bridge::OutcomeCallback done) override;
  void commit_weights(bridge::InFlight in_flight, bridge::OutcomeCallback done) override;
  void cancel_weights() override;
  int64_t weight_version() const override;
  std::vector<std::pair<std::string, double>> stats() const override;
  bridge::Outcome health() const override;
  void shutdown() override;

 private:
  struct WorkerState {
    std::shared_ptr<WorkerLink> link;
    bool is_ready = false;
    bool is_stopped = false;
    int32_t num_wanted = 0;       // samples it has asked for
    int64_t num_outstanding = 0;  // expected tokens of what it works on
    std::map<std::string, double> stats;
  };
  // Acks still missing of one command to several workers.
  struct Collection {
    size_t num_missing = 0;
    bridge::Outcome error;  // the first
    int fd = -1;
    std::function<void(bridge::Outcome, int fd)> done;
  };
  struct ScoreBatch {
    std::vector<bridge::ScoredSequence> results;
    size_t num_missing = 0;
    bridge::Outcome error;
    std::function<void(bridge::Outcome, std::vector<bridge::ScoredSequence>)> done;
  };
  struct MeasurementSum {
    Measurement sum;
    size_t num_missing = 0;
    MeasurementCallback done;
  };
  // Calls out of the dispatcher, made after its lock is dropped.
  using Effects = std::vector<std::function<void()>>;
  using MakeCommand = std::function<Command(uint64_t ticket)>;

  GroupRequest make_group(bridge::PromptRequest prompt, int32_t index, int64_t request_id,
                          bridge::Outcome& skipped) const;
  void check_new_ids(const std::vector<bridge::PromptRequest>& prompts) const;
  void check_room(int64_t num_samples) const;
  void check_health() const;
  void dispatch();
  void broadcast(const std::vector<int32_t>& workers, const MakeCommand& make,
                 std::function<void(bridge::Outcome, int fd)> done);
  std::vector<int32_t> all_workers() const;
  std::vector<int32_t> packing_workers() const;
  void release_tokens(int32_t worker, int64_t num_tokens);
  void share_weights(bridge::InFlight in_flight, bridge::OutcomeCallback done);
  void switch_weights(bridge::InFlight in_flight, bridge::OutcomeCallback done);
  void drop_update(const bridge::OutcomeCallback& done, bridge::Outcome error);
  void end_with(ErrorInfo error, Effects& effects);
  void run(Effects& effects);

  void on_event(int32_t worker, WorkerReady& event, Effects& effects);
  void on_event(int32_t worker, Pull& event, Effects& effects);
  void on_event(int32_t worker, SampleDone& event, Effects& effects);
  void on_event(int32_t worker, SampleFailed& event, Effects& effects);
  void on_event(int32_t worker, Scored& event, Effects& effects);
  void on_event(int32_t worker, Ack& event, Effects& effects);
  void on_event(int32_t worker, WorkerStats& event, Effects& effects);
  void on_event(int32_t worker, Measured& event, Effects& effects);
  void on_event(int32_t worker, WorkerStopped& event, Effects& effects);
  void on_event(int32_t worker, WorkerFailed& event, Effects& effects);

  const Config config_;
  const ModelConfig model_;
  const EngineLimits limits_;
  const std::string fingerprint_;
  const bool shares_weights_;
  bridge::SampleSink* sink_ = nullptr;
  std::function<void()> on_end_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<WorkerState> workers_;
  std::set<std::pair<int64_t, int32_t>> askers_;  // (outstanding, worker) of those that want work
  Ledger ledger_;
  int64_t num_requests_ = 0;
  uint64_t num_tickets_ = 0;
  std::map<uint64_t, std::shared_ptr<Collection>> collections_;  // by ticket
  std::map<uint64_t, std::pair<std::shared_ptr<ScoreBatch>, size_t>> scores_;
  std::map<uint64_t, std::shared_ptr<MeasurementSum>> measurements_;
  std::optional<int64_t> update_version_;  // of the weight update under way
  bool is_switching_ = false;              // workers were told to commit
  int64_t weight_version_ = 0;
  bool is_ending_ = false;
  bridge::Outcome fatal_;
};

}  // namespace rollpack::rollout
