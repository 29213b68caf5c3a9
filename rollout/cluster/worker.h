// One rank's engine on its own thread: commands in through a mailbox, events out through a
// function. The thread owns the replica; weights switch between two steps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "rollout/cluster/messages.h"
#include "rollout/engine/engine.h"
#include "rollout/engine/reference_policy.h"
#include "rollout/engine/replica.h"
#include "rollout/measurement/step_meter.h"

namespace rollpack::rollout {

class Worker : public WorkerLink, private EngineOutput {
 public:
  // `emit` is called on threads of the worker's, from two at once while it checks weights.
  // `reference`, if any, scores every sample before it is emitted.
  Worker(Replica& replica, std::function<void(Event)> emit,
         std::unique_ptr<Replica> reference = nullptr);
  ~Worker() override;  // stops without handing back, if still running

  // has_weights: those of the replica are committed; otherwise they come by AdoptWeights and
  // CommitWeights before the first group.
  void start(bool has_weights = true);
  // Ends the thread without handing samples back; no event comes after it. Whoever takes the events
  // must outlive this call.
  void stop();
  void send(Command command) override;  // thread-safe
  void join();

 private:
  void run(bool has_weights);
  void work();
  bool step();  // false: there is nothing to do
  void finish_steps();
  bool must_stop();
  void tell_progress();
  bool take_commands();  // false: stopped
  void tell_capacity();
  void tell_stats(bool now);
  void warn_of_communication();
  std::vector<std::pair<std::string, double>> stats() const;
  void finish_switch();
  bool stands_still() const { return is_paused_ || !engine_.is_awake(); }
  void fall_asleep(const Sleep& command);
  int64_t held_bytes() const;
  void switch_weights(const CommitWeights& command);
  void check_staged(uint64_t ticket, bool exports);
  bool has_next_phase();
  void finish_check();
  void watch_prefill();

  void handle(AddGroups& command);
  void handle(AddScores& command);
  void handle(AbortSamples& command);
  void handle(Pause& command);
  void handle(Resume& command);
  void handle(Sleep& command);
  void handle(WakeUp& command);
  void handle(BeginWeights& command);
  void handle(StageWeights& command);
  void handle(FinishWeights& command);
  void handle(AdoptWeights& command);
  void handle(CommitWeights& command);
  void handle(DiscardWeights& command);
  void handle(Measure& command);
  void handle(TakeMeasurement& command);
  void handle(Stop& command);
  void handle(Ping& command);
  void acknowledge(uint64_t ticket, const std::function<void()>& action);
  void acknowledge_with_held_bytes(uint64_t ticket, const std::function<void()>& action);

  void tell_sample(bridge::Sample sample);
  int32_t attempt_of(const bridge::SampleKey& key);
  void on_sample(bridge::Sample sample) override;
  void on_failed(bridge::FailedSample sample) override;
  void on_scored(uint64_t ticket, bridge::Outcome error, bridge::ScoredSequence scored) override;

  Replica& replica_;
  const std::function<void(Event)> emit_;
  Engine engine_;
  std::optional<ReferencePolicy> reference_;
  std::optional<StepMeter> meter_;  // while steps are measured
  struct Attempt {
    int32_t number = 0;
    int32_t num_left = 0;  // samples
  };
  std::map<std::pair<int64_t, int32_t>, Attempt> attempts_;  // by request and prompt
  int32_t num_pulled_ = 0;                                   // samples asked for and not yet given
  bool is_paused_ = false;                                   // no steps at all
  bool is_stopped_ = false;
  std::vector<uint64_t> pending_pauses_;         // tickets; wait for running samples to finish
  std::optional<CommitWeights> pending_commit_;  // likewise
  std::optional<Sleep> pending_sleep_;           // likewise
  std::thread check_;                            // reads the staged set through while steps go on
  bool is_phase_due_ = false;                    // of the update under way
  std::chrono::nanoseconds phase_wait_{0};       // what is left of its waits for phases
  UpdateTimes times_;                            // of the update under way
  UpdateTimes last_times_;                       // of the last one that was switched to
  double last_prefill_ms_ = 0;
  std::optional<std::chrono::steady_clock::time_point> prefill_since_;  // the last switch
  std::chrono::steady_clock::time_point stats_due_;
  std::chrono::steady_clock::time_point progress_due_;
  int64_t num_layers_told_ = 0;
  bool has_warned_of_communication_ = false;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Command> mailbox_;
  std::thread thread_;
};

}  // namespace rollpack::rollout
