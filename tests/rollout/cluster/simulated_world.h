// The made-up parts of a simulated cluster: time, wires and workers.
#pragma once

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "rollout/cluster/dispatcher.h"
#include "tests/rollout/cluster/simulation.h"

namespace rollpack::rollout::simulation {

inline constexpr int64_t kLeaseMs = 2000;

class Dice {
 public:
  explicit Dice(uint64_t seed) : random_(seed * 0x9e3779b97f4a7c15 + 1) {}
  int64_t below(int64_t bound) { return static_cast<int64_t>(random_() % bound); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool chance(double probability) {
    return static_cast<double>(random_() >> 11) * 0x1p-53 < probability;
  }

 private:
  std::mt19937_64 random_;
};

// What all parts of one run share.
struct World {
  explicit World(uint64_t seed) : dice(seed) {}

  void fault(Fault which) { ++report.num_faults[static_cast<size_t>(which)]; }
  void check(bool holds, const std::string& what) {
    if (!holds && report.violation.empty()) report.violation = what;
  }
  std::chrono::steady_clock::time_point time() const {
    return std::chrono::steady_clock::time_point(std::chrono::milliseconds(now_ms));
  }

  Dice dice;
  int64_t now_ms = 1000000;
  double fault_rate = 0;           // of each kind, a chance
  bool has_calmed_down = false;    // no more faults: the run is to come to its end
  int64_t committed_version = 0;   // of weights, as the client was told
  size_t num_partial_updates = 0;  // since the last full one
  Report report;
  std::set<int64_t> poison;  // prompts, by their number
};

// What a sample must hold: a function of prompt, sample and weights, whoever draws it and however
// often.
inline std::vector<int32_t> expected_tokens(const std::vector<int32_t>& prompt, int32_t sample,
                                            int64_t weights) {
  uint64_t hash = 1469598103934665603u;
  for (const int64_t value :
       {int64_t{prompt[0]}, int64_t{prompt.back()}, int64_t{sample}, weights}) {
    hash = (hash ^ static_cast<uint64_t>(value)) * 1099511628211u;
  }
  return {static_cast<int32_t>(hash & 0x7fffffff), static_cast<int32_t>(hash >> 33)};
}

// A packed set of weights: a memfd that holds their number.
bridge::OwnedFd packed_set(int64_t weights);

class SimulatedBridge;

// A worker process with its link, as a model of Worker: it takes commands in order, needs time, and
// answers. Weights are a number: the sum of the tensor sizes it was sent.
class SimulatedWorker : public WorkerLink, public std::enable_shared_from_this<SimulatedWorker> {
 public:
  SimulatedWorker(World& world, Dispatcher& dispatcher, bool is_process, int node = 0)
      : world_(world), dispatcher_(dispatcher), is_process_(is_process), node_(node) {}

  // Bridges of nodes but rank 0's, by node: its samples for them go there, as the real SampleWay
  // and StraightWay have them go. `held`: the one that it holds itself, if any.
  using Bridges = std::map<int32_t, std::unique_ptr<SimulatedBridge>>;
  void set_bridges(const Bridges& bridges, SimulatedBridge* held) {
    bridges_ = &bridges;
    held_ = held;
  }

  // WorkerLink
  void send(Command command) override {
    inbox_.push_back({arrival(inbox_), std::move(command), world_.committed_version});
  }
  bool is_own_process() const override { return is_process_; }
  int node() const override { return node_; }
  void kill() override;

  // Joins the dispatcher and says that it is there.
  void start(int32_t index, bool is_replacement = false);
  // One turn: commands that have arrived, some work, events that arrive at the dispatcher.
  void turn();
  // Faults.
  void die(bool loses_tail);
  bool is_given_up() const { return is_stopped_ || was_killed_; }
  void stop_for(int64_t ms);
  void forgive_stop() { stopped_at_ms_ = world_.now_ms; }  // rank 0 itself stood still
  void fail();
  bool is_alive() const { return is_alive_; }
  bool has_left() const { return has_left_; }
  bool stands_still() const { return world_.now_ms < stopped_until_ms_; }
  bool has_samples_under_way() const { return !under_way_.empty(); }

  int64_t index() const { return index_; }

 private:
  struct Item {
    GroupRequest group;
    int32_t sample = 0;
    int64_t committed_version = 0;  // when it was handed out
    int64_t turns_left = 0;
    bool has_started = false;
  };
  template <class T>
  struct OnWire {
    int64_t arrives_ms = 0;
    T message;
    int64_t committed_version = 0;  // when it was sent
  };
  // A sample that was sent to another node's bridge, which has not said that it has it.
  struct UnderWay {
    SampleDone done;
    int64_t sent_ms = 0;
  };
  template <class T>
  int64_t arrival(const std::deque<OnWire<T>>& wire);
  void emit(Event event);
  void deliver();
  void work();
  void finish(const Item& item, bool is_aborted);
  void hand_over(SampleDone done);
  void take_receipt(int32_t node, uint64_t number);
  void check_receipts();
  void leave_bridges(bool loses_tail);
  void hand_back(std::optional<int64_t> request_id);
  void answer(uint64_t ticket, bridge::Outcome error = std::nullopt);
  void answer_with_hash(uint64_t ticket, int64_t weights);
  void switch_to(const CommitWeights& commit);
  void finish_waits();
  bool rests() const { return is_paused_ || asleep_.any() || !has_weights_; }
  void fall_asleep(const Sleep& command);

  void handle(AddGroups& command);
  void handle(AddScores& command);
  void handle(AbortSamples& command) { hand_back(command.request_id); }
  void handle(Pause& command);
  void handle(Resume& command);
  void handle(Sleep& command);
  void handle(WakeUp& command);
  void handle(BeginWeights& command);
  void handle(StageWeights& command);
  void handle(FinishWeights& command);
  void handle(AdoptWeights& command);
  void handle(CommitWeights& command);
  void handle(DiscardWeights&) { staged_.reset(); }
  void handle(Measure& command) { answer(command.ticket); }
  void handle(Ping& command) { answer(command.ticket); }
  void handle(TakeMeasurement& command) { emit(Measured{.ticket = command.ticket}); }
  void handle(Stop& command);

  World& world_;
  Dispatcher& dispatcher_;
  const bool is_process_;
  const int node_;
  const Bridges* bridges_ = nullptr;
  SimulatedBridge* held_ = nullptr;
  std::map<int32_t, std::map<uint64_t, UnderWay>> under_way_;  // by node, by number; none is empty
  std::vector<std::pair<int32_t, uint64_t>> receipts_;         // arrived, by node and number
  std::set<int32_t> links_;                                    // nodes
  uint64_t num_sent_ = 0;
  int32_t index_ = -1;
  bool is_alive_ = true;     // the process
  bool has_left_ = false;    // the dispatcher was told that the link is at its end
  bool is_stopped_ = false;  // by command
  bool is_paused_ = false;
  bridge::MemoryTags asleep_;
  bool has_weights_ = true;
  bool was_killed_ = false;  // or should have been
  int64_t stopped_at_ms_ = 0, stopped_until_ms_ = 0;
  bool owed_at_stop_ = false;
  bool is_replacement_ = false;
  bool is_at_fault_ = false;  // gave a reason to be given up
  int64_t next_word_ms_ = 0;
  int64_t committed_version_ = 0;  // when the command at hand was sent
  std::deque<OnWire<Command>> inbox_;
  std::deque<OnWire<Event>> outbox_;
  std::vector<Item> items_;
  std::vector<ScoreRequest> scores_;
  int32_t num_pulled_ = 0;
  int64_t weights_ = 0, version_ = 0;
  std::optional<int64_t> staged_;
  std::vector<uint64_t> pending_pauses_;
  std::optional<CommitWeights> pending_commit_;
  std::optional<Sleep> pending_sleep_;
};

}  // namespace rollpack::rollout::simulation
