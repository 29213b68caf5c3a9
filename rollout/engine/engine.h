// The step loop of one replica: plan (a batching policy), forward and sample (the backend), retire.
// Where the backend computes by itself (BackendInfo::max_steps_under_way), the next step is planned
// and submitted before the results of the one before are back: lengths are known then, tokens and
// stops are not. Bits are the same. A sample whose stop comes to light has at most one row in the
// step under way, which counts for nothing; its pages are its own until that step has ended.
// Used from one thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "rollout/batching/batching_policy.h"
#include "rollout/engine/engine_state.h"
#include "rollout/engine/request.h"
#include "rollout/engine/step_work.h"
#include "trainer_bridge/contract/rollout_service.h"

namespace rollpack::rollout {

// Where an engine puts what it has made; called from inside step(), add() and abort().
class EngineOutput {
 public:
  virtual ~EngineOutput() = default;
  virtual void on_sample(bridge::Sample sample) = 0;
  virtual void on_failed(bridge::FailedSample sample) = 0;
  virtual void on_scored(uint64_t ticket, bridge::Outcome error, bridge::ScoredSequence scored) = 0;
};

class Engine {
 public:
  // The backend's program must be set and its weights committed before the first step.
  Engine(const EngineLimits& limits, std::unique_ptr<BatchingPolicy> policy,
         kernels::Backend& backend, EngineOutput& output);

  // Requests are checked by check_group / check_score before they get here.
  void add(GroupRequest request);
  void add_score(ScoreRequest request);
  // Ends the samples of one request, or all samples: each is handed out as a partial sample with
  // finish_reason abort, with the tokens known so far: it does not wait for steps under way.
  // Returns how many.
  int64_t abort(std::optional<int64_t> request_id);

  bool has_work() const { return !state_.running.empty() || !state_.waiting.empty(); }
  int64_t num_open() const;  // samples and sequences waiting or running
  // Samples to have open so that the engine stays full.
  int32_t num_wanted() const { return policy_->num_wanted(state_.limits); }
  // Whether some sample has tokens and is not finished, running or preempted.
  bool has_started_work() const;
  // Whether a sample that has tokens waits, or computes keys and values of some of them anew.
  bool is_behind() const;
  enum class StepOutcome : uint8_t { kDone, kNothingToDo, kInterrupted };
  // One step; returns when its results are applied, the next one perhaps under way.
  // `is_interrupted` is asked every 100 ms while the backend computes: once true the results of
  // steps under way are given up, and only abort() may follow. Errors: deadline_exceeded when the
  // backend does not finish within `timeout`, or whatever the backend reports: the engine is then
  // unusable.
  StepOutcome step(
      std::chrono::milliseconds timeout,
      const std::function<bool()>& is_interrupted = [] { return false; });
  // Waits for the steps under way and applies their results; false: interrupted. Before what
  // changes keys and values of all sequences. Errors: those of step().
  bool finish_steps(
      std::chrono::milliseconds timeout,
      const std::function<bool()>& is_interrupted = [] { return false; });

  // false: nothing new starts, what runs goes on.
  void set_admits(bool admits) { state_.admits = admits; }
  // Weights changed: keys and values are forgotten, tokens kept; later tokens carry `version`. No
  // step may be under way.
  void switch_version(int64_t version);

  // Gives the backend's memory back (Backend::sleep): keys and values, cached ones too, are
  // forgotten, tokens kept. step() finds nothing to do until all of it has been taken again, and
  // after level 2 until weights have been switched to as well. No step may be under way.
  // Errors: those of the backend.
  void sleep(int level);
  void wake_up(kernels::MemoryTags tags);
  bool is_awake() const { return !asleep_.weights && !asleep_.kv_cache && !needs_weights_; }

  // Schedules by `policy` from now on: keys and values, cached ones too, are forgotten, tokens
  // kept. No step may be under way.
  void set_policy(std::unique_ptr<BatchingPolicy> policy);
  // Tells `observer` of every step from now on; null: nobody.
  void set_observer(StepObserver* observer) { observer_ = observer; }

  const EngineState& state() const { return state_; }
  int64_t weight_version() const { return state_.weight_version; }

 private:
  using Clock = std::chrono::steady_clock;

  // A step that the backend has.
  struct Flight {
    StepBatch batch;
    kernels::StepHandle handle = 0;
    int64_t num_rows = 0;
    Clock::time_point submitted;
  };

  bool may_plan() const;
  // False: there is nothing to compute.
  bool submit_next();
  // Waits for the oldest step under way and applies its results; false: interrupted.
  bool finish_oldest(std::chrono::milliseconds timeout,
                     const std::function<bool()>& is_interrupted);
  std::optional<kernels::StepResult> wait(kernels::StepHandle handle,
                                          std::chrono::milliseconds timeout,
                                          const std::function<bool()>& is_interrupted);
  void give_up_steps();
  void require_no_steps(const char* call) const;
  void apply(StepBatch& batch, const kernels::StepResult& result);
  void tell_observer(const StepBatch& batch);
  void take_token(Sequence& sequence, const kernels::HeadResult& result);
  void append_scores(const StepBatch::Entry& entry, const kernels::StepResult& result);
  void emit(Sequence& sequence);
  void emit_scored(Sequence& sequence);
  void fail(Sequence& sequence, ErrorInfo error);

  EngineState state_;
  std::unique_ptr<BatchingPolicy> policy_;
  kernels::Backend& backend_;
  EngineOutput& output_;
  const size_t max_steps_under_way_;
  std::deque<Flight> flights_;  // oldest first
  StepBatch batch_;             // being planned
  StepObserver* observer_ = nullptr;
  kernels::MemoryTags asleep_;
  bool needs_weights_ = false;      // level 2 has dropped them
  StepWork work_;                   // of the step whose results are applied
  Clock::time_point last_ended_;    // a step, as this thread saw it
  Clock::duration backend_time_{};  // of the call under way, what the backend took
  uint64_t num_arrivals_ = 0;
};

// Errors of a request that this engine could never serve: invalid_argument or resource_exhausted
// naming the field, and the bytes that would be needed. nullopt: it can be added.
bridge::Outcome check_group(const GroupRequest& request, const EngineLimits& limits,
                            const std::string& origin);
bridge::Outcome check_score(const bridge::ScoreSequence& sequence, const EngineLimits& limits,
                            int64_t vocab_size);

}  // namespace rollpack::rollout
