#include "tests/rollout/cluster/simulation.h"

#include <sys/mman.h>

#include <utility>

#include "kernels/base/error.h"
#include "tests/rollout/cluster/simulated_bridge.h"
#include "tests/rollout/cluster/simulated_trainer.h"
#include "tests/rollout/cluster/simulated_world.h"
#include "tests/rollout/tiny_model.h"
#include "trainer_bridge/contract/sample_sink.h"
#include "trainer_bridge/shared_memory/segment.h"

namespace rollpack::rollout::simulation {
namespace {

constexpr int kActiveTurns = 90;
constexpr int kTurnsOfStop = 60;  // more than the lease and a second that a stop may cost
constexpr int kCalmTurns = 1200;  // far more than what is open can need

// A sealed memfd for weight chunks; what they hold is said by their tensor's shape.
struct ChunkMemory {
  ChunkMemory() : fd(::memfd_create("chunk", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {
    if (::ftruncate(fd.get(), 64) != 0) std::abort();
    ::fcntl(fd.get(), F_ADD_SEALS, bridge::kPeerSeals);
    segment.emplace(bridge::MappedSegment::map(fd.get(), 64, bridge::kPeerSeals, "simulation"));
  }
  bridge::OwnedFd fd;
  std::optional<bridge::MappedSegment> segment;
};

const ChunkMemory& chunk_memory() {
  static const ChunkMemory memory;
  return memory;
}

// Counts what is owed to callers: every callback is called exactly once.
class Callbacks {
 public:
  explicit Callbacks(World& world) : world_(world) {}
  bridge::OutcomeCallback outcome(std::function<void(bridge::Outcome)> then) {
    ++num_waiting_;
    return [this, then = std::move(then),
            was_called = std::make_shared<bool>(false)](bridge::Outcome outcome) {
      world_.check(!std::exchange(*was_called, true), "a callback was called twice");
      --num_waiting_;
      then(std::move(outcome));
    };
  }
  int num_waiting() const { return num_waiting_; }

 private:
  World& world_;
  int num_waiting_ = 0;
};

class Run : public bridge::SampleSink {
 public:
  explicit Run(uint64_t seed);
  Report run();

  void commit(bridge::Sample sample) override;
  void fail(bridge::FailedSample sample) override;

 private:
  static SampleName name_of(const bridge::SampleKey& key) {
    return {key.request_id, key.prompt_index, key.sample_index};
  }
  void begin_life();
  void drop_samples_of(int32_t node);
  void end_life();
  void restart();
  void turn();
  void inject_faults();
  void act();
  void submit();
  void update();
  void cancel();
  void stage();
  void end_update(bridge::Outcome error);
  void score();
  void sleep_or_wake();
  void wake_up(bridge::MemoryTags tags);
  void start_replacements();
  void calm_down();
  bool is_quiet() const;
  void accept(int64_t request);
  // With a journal the job is started again.
  bool is_over() { return !disk_ && dispatcher_->health().has_value(); }
  void resume();
  void end(const SampleName& name);

  const bool shares_weights_;
  const bool sleeps_;  // now and then
  World world_;
  Dice sleep_dice_;  // of their own, so that other seeds stay what they were
  std::optional<Callbacks> callbacks_;
  // Of runs with a journal.
  std::shared_ptr<testing::Disk> disk_;
  std::optional<SimulatedTrainer> trainer_;
  std::unique_ptr<Life> life_;
  int64_t told_version_ = 0;   // of weights, to the client
  int64_t least_version_ = 0;  // that samples may be of: older ones were not to be made
  std::unique_ptr<Dispatcher> dispatcher_;
  bool replaces_lost_ = false;
  std::vector<std::shared_ptr<SimulatedWorker>> workers_;
  std::optional<SimulatedBridges> bridges_;     // of other nodes, in some runs
  std::map<int64_t, int32_t> node_of_request_;  // but rank 0's
  std::vector<int64_t> starts_ms_;              // when replacements that were asked for come up
  std::map<SampleName, bool> samples_;          // submitted: whether it has ended
  size_t num_ended_ = 0;
  int64_t num_prompts_ = 0;
  std::set<int64_t> requests_;
  std::set<int64_t> in_doubt_;  // asked for, and the reply is not there yet
  bool is_paused_ = false;
  // Of weight updates.
  enum class Update { kNone, kAsked, kOpen };
  Update update_ = Update::kNone;
  bool is_partial_ = false;
  std::optional<int64_t> reload_;  // the version that is sent again after a restart
  int64_t version_ = 0, staged_ = 0;
  std::map<int64_t, int64_t> weights_of_{{0, 0}};  // committed or being committed, by version
};

RecoveryOptions recovery_of(const World& world) {
  return {.is_on = true, .lease = std::chrono::milliseconds(kLeaseMs), .now = [&world] {
            return world.time();
          }};
}

EngineLimits simulated_limits() {
  return {.page_tokens = 16, .num_pages = 1000, .page_bytes = 1024, .max_positions = 4096};
}

Run::Run(uint64_t seed)
    : shares_weights_(seed % 3 == 0),
      sleeps_(seed % 5 == 2),
      world_(seed),
      sleep_dice_(seed + 1000000007) {
  // From a quiet run to one where nearly everything goes wrong.
  world_.fault_rate = std::array{0.003, 0.01, 0.03, 0.1}[seed % 4];
  replaces_lost_ = world_.dice.chance(0.6);
  if (world_.dice.chance(0.5)) {
    disk_ = std::make_shared<testing::Disk>();
    trainer_.emplace(world_, static_cast<int32_t>(world_.dice.between(1, 2)));
  }
  begin_life();
}

void Run::begin_life() {
  callbacks_.emplace(world_);
  dispatcher_ =
      std::make_unique<Dispatcher>(tiny_config(), tiny_model_config(), simulated_limits(), "same",
                                   /*weights_hash=*/0, shares_weights_, recovery_of(world_));
  dispatcher_->set_sink(*this);
  if (replaces_lost_) {
    dispatcher_->set_replace(
        [this](int) { starts_ms_.push_back(world_.now_ms + world_.dice.between(100, 3000)); });
  }
  if (disk_) {
    life_ = std::make_unique<Life>(world_, disk_);
    trainer_->connect(*life_);
    const RestoredRequests requests = life_->journal.log().live().requests();
    dispatcher_->restore(life_->journal, requests);
    const auto awaited = dispatcher_->awaited_weight_version();
    least_version_ = awaited.value_or(0);
    world_.check(!awaited || *awaited >= told_version_,
                 fmt::format("the client was told of version {}, and {} is awaited", told_version_,
                             awaited.value_or(0)));
    world_.check(awaited || told_version_ == 0 || requests.groups.empty(),
                 "nothing is awaited though the weights are others");
    if (awaited) world_.fault(Fault::kAwaitedWeights);
  }
  const int64_t num_nodes = !disk_ && world_.dice.chance(0.5) ? world_.dice.between(2, 3) : 1;
  const int64_t num_workers = std::max(num_nodes, world_.dice.between(1, 5));
  for (int64_t i = 0; i < num_workers; ++i) {
    // Every node has one.
    const int64_t node =
        i < num_nodes || num_nodes == 1 ? i % num_nodes : world_.dice.below(num_nodes);
    const auto worker = std::make_shared<SimulatedWorker>(
        world_, *dispatcher_, /*is_process=*/i > 0, static_cast<int>(node));
    worker->start(dispatcher_->add_worker(worker));
    workers_.push_back(worker);
  }
  if (num_nodes > 1) {
    bridges_.emplace(world_, *dispatcher_, *this, workers_, static_cast<int32_t>(num_nodes));
  }
  if (shares_weights_) dispatcher_->share_first_weights(packed_set(0));
}

// Nothing of it is left but the journal and what the trainer has.
void Run::end_life() {
  trainer_->lose_job();
  life_->journal.crash();
  workers_.clear();
  starts_ms_.clear();
  dispatcher_.reset();
  life_.reset();
  is_paused_ = false;
  update_ = Update::kNone;
  reload_.reset();
  world_.committed_version = 0;
  world_.num_partial_updates = 0;
  for (auto& [name, has_ended] : samples_) has_ended = false;
  num_ended_ = 0;
}

void Run::restart() {
  world_.fault(Fault::kRank0Death);
  end_life();
  begin_life();
  told_version_ = least_version_;
  // What was asked for and not told to be accepted may be gone; then its number is free again.
  const int64_t num_requests = life_->journal.log().live().counters().num_requests;
  for (const int64_t request : std::exchange(in_doubt_, {})) {
    if (request < num_requests) {
      accept(request);
      continue;
    }
    world_.fault(Fault::kLostSubmit);
    samples_.erase(samples_.lower_bound({request, 0, 0}),
                   samples_.lower_bound({request + 1, 0, 0}));
    requests_.erase(request);
  }
  world_.check(requests_.empty() || *requests_.rbegin() < num_requests,
               "a request that was accepted is gone");
}

// The client was told.
void Run::accept(int64_t request) {
  in_doubt_.erase(request);
  for (auto it = samples_.lower_bound({request, 0, 0});
       it != samples_.end() && std::get<0>(it->first) == request; ++it) {
    trainer_->expect(it->first);
  }
}

Report Run::run() {
  for (int i = 0; i < kActiveTurns && !is_over(); ++i) {
    inject_faults();
    act();
    turn();
  }
  calm_down();
  for (int i = 0; i < kCalmTurns && !is_over() && !is_quiet(); ++i) {
    turn();
    if (dispatcher_->sleep_state().needs_weights) {
      update();
    } else if (update_ == Update::kOpen) {
      cancel();
    }
    if (dispatcher_->awaited_weight_version()) resume();
  }
  if (bridges_ && !is_over()) bridges_->check_end();
  // Idle, a bridge owes nothing that leases are about, and is to be missed all the same.
  if (bridges_ && !is_over() && bridges_->stop_one()) {
    for (int i = 0; i < kTurnsOfStop && !is_over(); ++i) turn();
  }
  if (disk_) {
    world_.check(in_doubt_.empty(), "a submit was not answered");
    world_.check(trainer_->is_done(), fmt::format("{} of {} samples were lost",
                                                  trainer_->num_missing(), samples_.size()));
    world_.report.num_samples += static_cast<int64_t>(samples_.size());
    life_->journal.sync();
    world_.check(life_->journal.log().live().num_groups() == 0, "the journal holds what has ended");
  } else if (is_over()) {
    world_.fault(Fault::kNoWorkerLeft);
    for (const auto& worker : workers_) {
      world_.check(!worker->is_alive() || worker->has_left() || worker->is_given_up() ||
                       dispatcher_->sleep_state().needs_weights,
                   "the job ended though a worker was there");
    }
  } else {
    world_.check(
        num_ended_ == samples_.size(),
        fmt::format("{} of {} samples were lost", samples_.size() - num_ended_, samples_.size()));
    world_.check(dispatcher_->abort(std::nullopt) == 0, "the ledger holds what has ended");
    world_.report.num_samples += static_cast<int64_t>(samples_.size());
  }
  world_.check(callbacks_->num_waiting() == 0, "a callback was never called");
  double num_counted = 0;
  for (const auto& [name, value] : dispatcher_->stats()) {
    if (name == "num_late_samples_dropped" && value > 0) world_.fault(Fault::kLateResult);
    if (name == "num_queued_samples") world_.check(value == 0 || is_over(), "samples stay queued");
    for (const char* ending : {"stop", "length", "abort", "failed"}) {
      if (name == fmt::format("num_samples_{}", ending)) num_counted += value;
    }
  }
  world_.check(
      disk_ || is_over() || (bridges_ && bridges_->has_lost_one()) ||
          num_counted == static_cast<double>(samples_.size()),
      fmt::format("{} of {} samples were counted by how they ended", num_counted, samples_.size()));
  return world_.report;
}

// ---- what comes out
// ------------------------------------------------------------------------------

void Run::end(const SampleName& name) {
  const auto found = samples_.find(name);
  world_.check(found != samples_.end(), "a sample came that nobody asked for");
  if (found == samples_.end()) return;
  world_.check(
      !std::exchange(found->second, true),
      fmt::format("sample {} of prompt {} came twice", std::get<2>(name), std::get<1>(name)));
  ++num_ended_;
  if (trainer_) {
    world_.check(!trainer_->is_released(name), "what was acknowledged was made again");
  }
}

void Run::commit(bridge::Sample sample) {
  end(name_of(sample.key));
  if (!sample.response_ids.empty()) {
    const int64_t version = sample.weight_versions.at(0).version;
    world_.check(weights_of_.contains(version), "a sample is of a version that never was");
    world_.check(version >= least_version_, "a sample did not wait for its weights");
    std::vector<int32_t> expected =
        expected_tokens(*sample.prompt_ids, sample.key.sample_index, weights_of_[version]);
    if (sample.finish_reason == bridge::FinishReason::kAbort) {
      expected.resize(std::min(expected.size(), sample.response_ids.size()));
    }
    world_.check(sample.response_ids == expected,
                 fmt::format("a sample of version {} holds other tokens", version));
  }
  if (life_) life_->delivery.commit(std::move(sample));
}

void Run::fail(bridge::FailedSample sample) {
  end(name_of(sample.key));
  world_.fault(Fault::kConviction);
  world_.check(sample.error.field == "prompt", "a failure without a reason");
  if (life_) life_->delivery.fail(std::move(sample));
}

// ---- what happens
// --------------------------------------------------------------------------------

void Run::turn() {
  world_.now_ms += world_.dice.between(10, 150);
  const auto first = static_cast<size_t>(world_.dice.below(static_cast<int64_t>(workers_.size())));
  for (size_t i = 0; i < workers_.size(); ++i) workers_[(first + i) % workers_.size()]->turn();
  start_replacements();
  dispatcher_->check_leases();
  if (bridges_) bridges_->turn([this](int32_t lost) { drop_samples_of(lost); });
  if (!disk_) return;
  trainer_->turn();
  if (world_.dice.chance(0.4) || world_.has_calmed_down) life_->journal.sync();
  if (dispatcher_->health() || world_.dice.chance(world_.fault_rate / 2)) restart();
}

// Its bridge is gone: nobody is left to have what had not come.
void Run::drop_samples_of(int32_t node) {
  std::erase_if(samples_, [&](const auto& each) {
    const auto asked = node_of_request_.find(std::get<0>(each.first));
    return !each.second && asked != node_of_request_.end() && asked->second == node;
  });
}

void Run::start_replacements() {
  for (size_t i = 0; i < starts_ms_.size();) {
    if (starts_ms_[i] > world_.now_ms) {
      ++i;
      continue;
    }
    starts_ms_.erase(starts_ms_.begin() + static_cast<int64_t>(i));
    if (world_.dice.chance(world_.fault_rate)) {
      world_.fault(Fault::kFailedStart);
      dispatcher_->replacement_failed({.code = ErrorCode::kUnavailable, .field = "replacement"});
      continue;
    }
    world_.fault(Fault::kReplacement);
    const auto worker =
        std::make_shared<SimulatedWorker>(world_, *dispatcher_, /*is_process=*/true);
    workers_.push_back(worker);
    worker->start(dispatcher_->add_replacement(worker), /*is_replacement=*/true);
  }
}

void Run::inject_faults() {
  Dice& dice = world_.dice;
  const double rate = world_.fault_rate;
  for (size_t i = 0; i < workers_.size(); ++i) {
    SimulatedWorker& worker = *workers_[i];
    if (!worker.is_alive()) continue;
    if (dice.chance(rate / 8)) worker.fail();
    if (i == 0) continue;  // rank 0's own worker lives as long as rank 0
    if (dice.chance(rate)) {
      world_.fault(update_ == Update::kNone ? Fault::kDeath : Fault::kDeathInUpdate);
      worker.die(/*loses_tail=*/dice.chance(0.5));
    } else if (dice.chance(rate)) {
      const bool is_long = dice.chance(0.5);
      world_.fault(is_long ? Fault::kStop : Fault::kShortStop);
      worker.stop_for(is_long ? 6000 : 900);
    }
  }
  if (dice.chance(rate / 4)) {
    world_.fault(Fault::kStoppedRank0);
    world_.now_ms += 30000;
    for (const auto& worker : workers_) worker->forgive_stop();
  }
}

void Run::act() {
  Dice& dice = world_.dice;
  if (dice.chance(0.2)) submit();
  if (dice.chance(0.03) && !requests_.empty()) {
    world_.fault(Fault::kAbort);
    const auto request = dice.chance(0.2) ? std::optional<int64_t>()
                                          : std::optional(dice.below(*requests_.rbegin() + 1));
    dispatcher_->abort(request);
  }
  if (dice.chance(0.03)) {
    world_.fault(Fault::kPause);
    is_paused_ = true;
    const auto mode = static_cast<bridge::InFlight>(dice.below(3));
    dispatcher_->pause(mode, callbacks_->outcome([](bridge::Outcome) {}));
  }
  if (is_paused_ && dice.chance(0.2)) {
    is_paused_ = false;
    resume();
  }
  if (dispatcher_->awaited_weight_version() && dice.chance(0.02)) resume();
  if (dice.chance(0.3)) update();
  if (dice.chance(0.03)) score();
  if (sleeps_) sleep_or_wake();
}

void Run::sleep_or_wake() {
  const bridge::SleepState state = dispatcher_->sleep_state();
  if (!state.asleep.any() && sleep_dice_.chance(0.06)) {
    world_.fault(Fault::kSleep);
    const auto level = static_cast<int>(sleep_dice_.between(1, 2));
    const auto mode = static_cast<bridge::InFlight>(sleep_dice_.below(3));
    const auto done = callbacks_->outcome([](bridge::Outcome) {});
    dispatcher_->sleep(level, mode,
                       [done](bridge::Outcome error, bridge::SleepState) { done(error); });
  }
  if (!state.asleep.any() || !sleep_dice_.chance(0.15)) return;
  const bool wakes_all = sleep_dice_.chance(0.4);
  const bool wakes_weights = sleep_dice_.chance(0.5);
  wake_up({.weights = wakes_all || wakes_weights, .kv_cache = wakes_all || !wakes_weights});
}

void Run::wake_up(bridge::MemoryTags tags) {
  const auto done = callbacks_->outcome([](bridge::Outcome) {});
  dispatcher_->wake_up(tags, [done](bridge::Outcome error, bridge::SleepState) { done(error); });
}

// Goes on with the weights there are, awaited or not.
void Run::resume() {
  if (dispatcher_->awaited_weight_version()) told_version_ = 0;
  least_version_ = 0;
  dispatcher_->resume();
}

void Run::submit() {
  std::vector<bridge::PromptRequest> prompts(static_cast<size_t>(world_.dice.between(1, 4)));
  for (bridge::PromptRequest& prompt : prompts) {
    const auto number = static_cast<int32_t>(num_prompts_++ % 70);
    prompt.input_ids = {number, static_cast<int32_t>(world_.dice.below(70))};
    prompt.n = static_cast<int32_t>(world_.dice.between(1, 4));
    if (world_.dice.chance(world_.fault_rate / 4)) world_.poison.insert(number);
  }
  const auto sizes = prompts;
  int64_t request = 0;
  const int32_t node = bridges_ ? bridges_->pick_node() : 0;
  try {
    request = dispatcher_->submit(std::move(prompts), node);
  } catch (const Error&) {
    return world_.check(
        dispatcher_->health().has_value() || dispatcher_->sleep_state().needs_weights,
        "a submit was refused");
  }
  requests_.insert(request);
  if (node > 0) node_of_request_[request] = node;
  for (size_t i = 0; i < sizes.size(); ++i) {
    for (int32_t sample = 0; sample < *sizes[i].n; ++sample) {
      samples_.emplace(SampleName{request, static_cast<int32_t>(i), sample}, false);
    }
  }
  if (!disk_) return;
  in_doubt_.insert(request);
  life_->journal.when_durable([this, request](const bridge::Outcome&) { accept(request); });
}

void Run::update() {
  if (update_ == Update::kAsked) return;
  if (update_ == Update::kNone) {
    reload_ = dispatcher_->awaited_weight_version();
    is_partial_ = !reload_ && world_.dice.chance(0.3) &&
                  !(world_.has_calmed_down && dispatcher_->sleep_state().needs_weights);
    staged_ = is_partial_ ? weights_of_[world_.committed_version] : 0;
    version_ = reload_.value_or(std::max(version_, world_.committed_version) + 1);
    update_ = Update::kAsked;
    bridge::WeightUpdate update{.version = version_};
    if (is_partial_) update.base_version = world_.committed_version;
    dispatcher_->begin_weights(update, callbacks_->outcome([this](bridge::Outcome error) {
      update_ = error ? Update::kNone : Update::kOpen;
    }));
    return;
  }
  if (reload_ ? staged_ < weights_of_[*reload_] : world_.dice.chance(0.5)) return stage();
  if (world_.dice.chance(0.2)) {
    return cancel();
  }
  update_ = Update::kAsked;
  weights_of_[version_] = staged_;
  dispatcher_->commit_weights(
      static_cast<bridge::InFlight>(world_.dice.below(3)),
      callbacks_->outcome([this](bridge::Outcome error) { end_update(std::move(error)); }));
}

void Run::cancel() {
  world_.fault(Fault::kCancelledUpdate);
  update_ = Update::kNone;
  dispatcher_->cancel_weights();
}

void Run::stage() {
  update_ = Update::kAsked;
  const int64_t weights = reload_ ? weights_of_[*reload_] - staged_ : world_.dice.between(1, 1000);
  bridge::WeightChunk chunk{.fd = chunk_memory().fd.get(),
                            .mapping = chunk_memory().segment->bytes()};
  chunk.tensors.push_back(
      {.name = "w", .shape = {weights}, .bytes = chunk_memory().segment->bytes()});
  dispatcher_->stage_weights(std::move(chunk),
                             callbacks_->outcome([this, weights](bridge::Outcome e) {
                               if (!e) staged_ += weights;
                               update_ = e ? Update::kNone : Update::kOpen;
                             }));
}

void Run::end_update(bridge::Outcome error) {
  update_ = Update::kNone;
  if (error) return;
  ++world_.report.num_updates;
  world_.committed_version = version_;
  world_.num_partial_updates = is_partial_ ? world_.num_partial_updates + 1 : 0;
  if (!disk_) return;
  life_->journal.when_durable([this, version = version_](const bridge::Outcome&) {
    if (!dispatcher_->awaited_weight_version()) told_version_ = version;
  });
}

void Run::score() {
  std::vector<bridge::ScoreSequence> sequences(static_cast<size_t>(world_.dice.between(1, 5)));
  for (size_t i = 0; i < sequences.size(); ++i) {
    sequences[i] = {.id = {.text = std::to_string(i)}, .input_ids = {1}, .response_ids = {2}};
  }
  const auto done = callbacks_->outcome([](bridge::Outcome) {});
  dispatcher_->score(
      sequences, [this, done, count = sequences.size()](
                     bridge::Outcome error, const std::vector<bridge::ScoredSequence>& results) {
        world_.check(error || results.size() == count, "scores are missing");
        for (size_t i = 0; !error && i < results.size(); ++i) {
          world_.check(results[i].id.text == std::to_string(i), "scores are out of order");
        }
        done(std::move(error));
      });
}

void Run::calm_down() {
  world_.has_calmed_down = true;
  world_.fault_rate = 0;
  if (is_paused_) resume();
  if (sleeps_) wake_up({.weights = true, .kv_cache = true});
}

bool Run::is_quiet() const {
  if (trainer_ && (!trainer_->is_done() || !in_doubt_.empty())) return false;
  // A trainer may have consumed its last batch while rank 0 was gone: it comes again, is passed
  // over, and only then released.
  if (disk_ && life_->journal.log().live().num_groups() > 0) return false;
  const bool has_ended =
      (trainer_ || num_ended_ == samples_.size()) && callbacks_->num_waiting() == 0;
  if (!has_ended || !bridges_) return has_ended;
  // What a bridge that is gone had asked for ends too, though nobody gets it.
  for (const auto& [name, value] : dispatcher_->stats()) {
    if (name == "num_open_samples" && value > 0) return false;
  }
  return bridges_->is_quiet();
}

}  // namespace

Report simulate(uint64_t seed) {
  return Run(seed).run();
}

}  // namespace rollpack::rollout::simulation
