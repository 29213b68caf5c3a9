// Rank 0's dispatcher: takes requests, hands whole groups to workers that ask for work, commits
// what comes back, and switches weights on all workers or on none. The RolloutService of the
// bridge. All methods are thread-safe and none blocks but wait_ready() and stop().
//
// A worker is lost when its link breaks, when it says that it failed, or when it owes something and
// has shown no progress for a lease. It is killed, what it held goes to others, and the rest of the
// job goes on, where the launcher lets it (RecoveryOptions).
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "rollout/cluster/kept_samples.h"
#include "rollout/cluster/kept_weights.h"
#include "rollout/cluster/ledger.h"
#include "rollout/cluster/messages.h"
#include "rollout/config/config.h"
#include "rollout/engine/engine_state.h"
#include "rollout/journal/request_log.h"
#include "rollout/model/model_config.h"
#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/contract/sample_sink.h"

namespace rollpack::rollout {

struct RecoveryOptions {
  bool is_on = false;  // false: the loss of a worker ends the job
  std::chrono::milliseconds lease{30000};
  std::function<std::chrono::steady_clock::time_point()> now = [] {
    return std::chrono::steady_clock::now();
  };
};

class Dispatcher : public bridge::RolloutService {
 public:
  // `limits`, `fingerprint` and `weights_hash`, of version 0, are those of rank 0's replica; every
  // worker has the same.
  // `shares_weights`: worker 0 packs updates and the others adopt its set.
  Dispatcher(const Config& config, const ModelConfig& model, const EngineLimits& limits,
             std::string fingerprint, uint64_t weights_hash, bool shares_weights,
             RecoveryOptions recovery = {});

  void set_sink(bridge::SampleSink& sink) { sink_ = &sink; }
  // Where samples are that workers keep on their nodes.
  void set_kept_samples(KeptSamples& kept) { kept_ = &kept; }
  // Called from any thread when the weight version, the awaited one or the health has changed.
  void set_on_change(std::function<void()> on_change) { on_change_ = std::move(on_change); }
  // Writes down what it does from here on, and goes on from what was written down before. Once,
  // after set_sink() and before any request; `log` lives until forget_log(). Where the weights were
  // not the checkpoint's, nothing is generated until they are current again or resume() is called.
  void restore(RequestLog& log, RestoredRequests restored);
  // The log can take nothing more, so nothing can be promised: everything that waits fails.
  void lose_log(ErrorInfo error);
  // Writes nothing down any more: the log may go before this.
  void forget_log();
  // Called once, from any thread, when shutdown() is asked for or no worker can go on.
  void set_on_end(std::function<void()> on_end) { on_end_ = std::move(on_end); }

  // Workers: number them from 0 in the order of the calls, then feed their events.
  int32_t add_worker(std::shared_ptr<WorkerLink> link);
  void handle(int32_t worker, Event event);
  // Sends the packed set that worker 0 has committed to all others, as version 0.
  void share_first_weights(bridge::OwnedFd fd);
  // The link broke. `error` names the rank.
  void lose_worker(int32_t worker, ErrorInfo error);
  // How a worker is started in a lost one's place; without it capacity only shrinks. Called from
  // any thread, must not block, and is answered by add_replacement() or replacement_failed().
  void set_replace(std::function<void(int rank_on_node)> replace) { replace_ = std::move(replace); }
  // As add_worker(). It takes part once it is ready and has the current weights.
  int32_t add_replacement(std::shared_ptr<WorkerLink> link);
  void replacement_failed(ErrorInfo error);
  // Gives up workers whose lease has run out. To be called several times a lease: a call that comes
  // late says that this process was stopped, and renews all leases.
  void check_leases();
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

  // What the service answers, at once.
  // `node`: whose bridge asks. `accepted` is called before any sample of the request is there,
  // under the dispatcher's lock.
  int64_t submit(std::vector<bridge::PromptRequest> prompts, int32_t node = 0,
                 const std::function<void(int64_t request_id)>& accepted = {});
  int64_t abort(std::optional<int64_t> request_id) { return end_samples(request_id, true); }
  // All that a node's bridge has asked for.
  int64_t abort_node(int32_t node) { return end_samples_of(node, true); }
  // The same, of a bridge that is gone: the next life goes on with what is written down of it.
  int64_t drop_node(int32_t node) { return end_samples_of(node, false); }
  bridge::WeightsInUse weights_in_use() const;
  Numbers stats() const;

  // RolloutService
  bridge::ServiceInfo info() const override;
  void submit(std::vector<bridge::PromptRequest> prompts, bridge::Answer<int64_t> done) override {
    done(std::nullopt, submit(std::move(prompts)));
  }
  void abort(std::optional<int64_t> request_id, bridge::Answer<int64_t> done) override {
    done(std::nullopt, request_id || !has_other_bridges_ ? abort(request_id) : abort_node(0));
  }
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
  bool takes_lent_weights() const override;
  void commit_weights(bridge::InFlight in_flight, bridge::OutcomeCallback done) override;
  void cancel_weights() override;
  int64_t weight_version() const override;
  void find_weights(bridge::Answer<bridge::WeightsInUse> done) override {
    done(std::nullopt, weights_in_use());
  }
  std::optional<int64_t> awaited_weight_version() const override;
  void find_stats(bridge::Answer<Numbers> done) override { done(std::nullopt, stats()); }
  // The numbers of each worker that takes part, as it last told them: at most a second old while it
  // computes.
  struct WorkerNumbers {
    int32_t rank = 0;
    double silence_s = 0;  // since it last showed progress, where it owes some
    std::shared_ptr<const std::map<std::string, double>> values;
  };
  std::vector<WorkerNumbers> worker_numbers() const;
  bridge::Outcome health() const override;
  void shutdown() override;

 private:
  using TimePoint = std::chrono::steady_clock::time_point;
  struct WorkerState {
    std::shared_ptr<WorkerLink> link;
    bool is_ready = false;
    bool is_stopped = false;  // also once it is lost
    bool is_lost = false;
    bool is_replacement = false;
    bool is_joining = false;               // started, and does not take part yet
    bool waits_to_join = false;            // for the end of a weight update
    int64_t joined_version = 0;            // of the weights it has, while it joins
    std::optional<uint64_t> weights_hash;  // that it told of last: staged, or in use
    bool has_committed = false;            // a sample
    bool is_doubted = false;               // another of its node is lost: no work until it answers
    bool is_paused = false;                // it said so: no progress is expected
    bool is_asleep = false;                // likewise
    int32_t num_wanted = 0;                // samples it has asked for
    int64_t num_outstanding = 0;           // expected tokens of what it works on
    std::set<uint64_t> tickets;            // it has to answer, whatever its state
    std::set<uint64_t> score_tickets;      // likewise, by steps
    TimePoint last_progress;               // or since when it owes something
    // Replaced, never changed: whoever sums thousands of them does so without the lock.
    std::shared_ptr<const std::map<std::string, double>> stats =
        std::make_shared<const std::map<std::string, double>>();

    bool takes_part() const { return !is_stopped && !is_joining; }
    bool owes() const {
      const bool has_steps_to_do = num_outstanding > 0 || !score_tickets.empty();
      return !tickets.empty() || (has_steps_to_do && !is_paused && !is_asleep);
    }
  };
  // Acks still missing of one command to several workers.
  struct Collection {
    size_t num_missing = 0;
    size_t num_answers = 0;                // the others were lost
    bool pauses = false;                   // who answers makes no progress from then on
    bool sleeps = false;                   // likewise
    bool must_succeed = false;             // who refuses is given up
    std::optional<uint64_t> weights_hash;  // who answers with another refuses
    bridge::Outcome error;                 // the first
    int fd = -1;
    std::function<void(bridge::Outcome, int fd)> done;
  };
  struct ScoreBatch {
    std::vector<bridge::ScoreSequence> sequences;  // kept, in case a worker is lost
    std::vector<int32_t> num_deaths;               // of workers that had it, a sequence
    std::vector<bridge::ScoredSequence> results;
    size_t num_missing = 0;
    bridge::Outcome error;
    bridge::Answer<std::vector<bridge::ScoredSequence>> done;
  };
  struct MeasurementSum {
    Measurement sum;
    size_t num_missing = 0;
    MeasurementCallback done;
  };
  struct SleepCall {
    int level = 0;  // 0: wakes up
    bridge::InFlight in_flight = bridge::InFlight::kKeep;
    bridge::MemoryTags tags;  // to wake
    bridge::Answer<bridge::SleepState> done;
  };
  // Calls out of the dispatcher, made after its lock is dropped.
  using Effects = std::vector<std::function<void()>>;
  using MakeCommand = std::function<Command(uint64_t ticket)>;

  GroupRequest make_group(bridge::PromptRequest prompt, int32_t index, int64_t request_id,
                          bridge::Outcome& skipped) const;
  int64_t end_samples(std::optional<int64_t> request_id, bool writes_down);
  int64_t end_samples_of(int32_t node, bool writes_down);
  void check_new_ids(const std::vector<bridge::PromptRequest>& prompts) const;
  void check_room(int64_t num_samples) const;
  void check_health() const;
  void check_weights() const;
  void dispatch();
  void add_sleep_call(SleepCall call);
  void begin_sleep_call(Effects& effects);
  void end_sleep_call(bridge::Outcome error);
  void put_to_sleep(int32_t worker);
  bool is_awake() const { return !asleep_.any() && !needs_weights_; }
  void go_on_awake(Effects& effects);
  bridge::SleepState current_sleep() const;
  void restore_group(RestoredGroup& group, Effects& effects);
  bool goes_on(const bridge::SampleKey& key, bridge::FinishReason reason, int32_t worker,
               int32_t attempt);
  bool is_cut(const bridge::SampleKey& key);
  bool count_sample(const bridge::SampleKey& key, bridge::FinishReason reason, int32_t worker,
                    int32_t attempt);
  bool is_on_the_way(int64_t version) const;
  void log_switch(int64_t version);
  void note_switch();
  bool asks(int32_t worker) const;
  GroupRequest take_group(const Ledger::GroupKey& key, int32_t worker);
  void dispatch_suspect();
  void send_score(const std::shared_ptr<ScoreBatch>& batch, size_t index);
  uint64_t new_ticket(int32_t worker);
  void expect_progress(int32_t worker);
  // Asks those of `workers` that live; an error when none answers.
  std::shared_ptr<Collection> broadcast(const std::vector<int32_t>& workers,
                                        const MakeCommand& make,
                                        std::function<void(bridge::Outcome, int fd)> done,
                                        Effects& effects);
  std::vector<int32_t> all_workers() const;  // that take part
  std::vector<int32_t> packing_workers() const;
  bool can_take_weights() const;  // some worker, that is
  void release_tokens(int32_t worker, int64_t num_tokens);
  void adopt_weights(bridge::OwnedFd fd, bridge::InFlight in_flight,
                     const bridge::OutcomeCallback& done);
  void switch_weights(bridge::InFlight in_flight, bridge::OutcomeCallback done);
  void end_switch(const bridge::WeightsInUse& switched, bridge::Outcome error,
                  const bridge::OutcomeCallback& done);
  uint64_t agree_on_weights(int64_t version, Effects& effects);
  ErrorInfo other_weights_error(int32_t worker, const bridge::WeightsInUse& expected) const;
  std::vector<int32_t> workers_beside_first() const;
  void drop_update(const bridge::OutcomeCallback& done, bridge::Outcome error);
  void end_with(ErrorInfo error, Effects& effects);
  void give_up(int32_t worker, ErrorInfo error, Effects& effects);
  void doubt_node(int node);
  void give_up_ticket(uint64_t ticket, const ErrorInfo& error, Effects& effects);
  void finish_score(const std::shared_ptr<ScoreBatch>& batch, size_t index, Scored event,
                    Effects& effects);
  static void finish(const std::shared_ptr<Collection>& collection, Effects& effects);
  bool has_worker_processes() const;
  double silence_s(const WorkerState& worker) const;
  // The dispatcher's own numbers; `of_workers` gets those of each worker, lost ones too.
  std::map<std::string, double> own_stats(
      std::vector<std::shared_ptr<const std::map<std::string, double>>>& of_workers) const;
  void ask(int32_t worker, const std::shared_ptr<Collection>& collection, const MakeCommand& make);
  void replace(const WorkerState& lost, Effects& effects);
  void start_replacement(int rank_on_node, Effects& effects);
  void start_unreplaced(Effects& effects);
  void end_if_nobody_is_left(const ErrorInfo& last, Effects& effects);
  void begin_join(int32_t worker, Effects& effects);
  void send_weights(int32_t worker, const std::shared_ptr<Collection>& collection);
  void end_join(int32_t worker, int64_t version);
  void resume_joins(Effects& effects);
  void commit_empty(const GroupRequest& request, Effects& effects);
  void fail_open(const GroupRequest& request, const ErrorInfo& error, Effects& effects);
  int64_t& num_finished(bridge::FinishReason reason) {
    return num_finished_[static_cast<size_t>(reason)];
  }
  void run(Effects& effects);
  void tell_change(Effects& effects) {
    if (on_change_) effects.push_back(on_change_);
  }

  void on_event(int32_t worker, WorkerReady& event, Effects& effects);
  void on_event(int32_t worker, Pull& event, Effects& effects);
  void on_event(int32_t worker, SampleDone& event, Effects& effects);
  void on_event(int32_t worker, SampleKept& event, Effects& effects);
  void on_event(int32_t worker, SampleWithdrawn& event, Effects& effects);
  void on_event(int32_t worker, SampleFailed& event, Effects& effects);
  void on_event(int32_t worker, Scored& event, Effects& effects);
  void on_event(int32_t worker, Ack& event, Effects& effects);
  void on_event(int32_t worker, StepProgress& event, Effects& effects);
  void on_event(int32_t worker, WorkerStats& event, Effects& effects);
  void on_event(int32_t worker, Measured& event, Effects& effects);
  void on_event(int32_t worker, WorkerStopped& event, Effects& effects);
  void on_event(int32_t worker, WorkerFailed& event, Effects& effects);

  const Config config_;
  const ModelConfig model_;
  const EngineLimits limits_;
  const std::string fingerprint_;
  const bool shares_weights_;
  const RecoveryOptions recovery_;
  const bool has_other_bridges_;
  bridge::SampleSink* sink_ = nullptr;
  KeptSamples* kept_ = nullptr;
  std::function<void()> on_end_;
  std::function<void()> on_change_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<WorkerState> workers_;
  std::set<std::pair<int64_t, int32_t>> askers_;  // (outstanding, worker) of those that want work
  std::function<void(int)> replace_;
  KeptWeights kept_weights_;
  int32_t num_starting_ = 0;  // replacements asked for and not there yet
  // Replacements in a row that are lost without a sample: another would fare no better.
  static constexpr int32_t kMaxFruitless = 3;
  int32_t num_fruitless_ = 0;
  std::vector<int> unreplaced_;  // ranks on this node that wait for a full update
  int64_t num_replacements_ = 0;
  bool is_paused_ = false;
  bridge::MemoryTags asleep_;
  bool needs_weights_ = false;         // sleep(level=2) has dropped them
  std::deque<SleepCall> sleep_calls_;  // the first is under way
  RequestLog* log_ = nullptr;
  std::optional<int64_t> awaited_version_;  // of weights, before anything is generated
  // Samples that were aborted in a batch of a life before, and are made again up to there.
  std::set<std::tuple<int64_t, int32_t, int32_t>> cut_samples_;
  std::optional<int32_t> quarantine_;  // the worker that is kept free for a suspect
  Ledger ledger_;
  TimePoint last_check_;  // of leases
  int64_t num_requests_ = 0;
  std::array<int64_t, 3> num_finished_ = {};  // samples committed, by FinishReason
  int64_t num_failed_ = 0;                    // samples
  int64_t num_weight_updates_ = 0;            // committed
  int64_t num_worker_deaths_ = 0;
  int64_t num_groups_requeued_ = 0;
  int64_t num_groups_convicted_ = 0;
  uint64_t num_tickets_ = 0;
  std::map<uint64_t, std::shared_ptr<Collection>> collections_;  // by ticket
  std::map<uint64_t, std::pair<std::shared_ptr<ScoreBatch>, size_t>> scores_;
  std::map<uint64_t, std::shared_ptr<MeasurementSum>> measurements_;
  std::optional<int64_t> update_version_;  // of the weight update under way
  UpdateTimes update_times_;               // of it, the longest
  bool is_switching_ = false;              // workers were told to commit
  bridge::WeightsInUse weights_;
  bool is_ending_ = false;
  bridge::Outcome fatal_;
};

}  // namespace rollpack::rollout
