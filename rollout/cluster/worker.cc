#include "rollout/cluster/worker.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include <spdlog/spdlog.h>

#include "kernels/base/error.h"
#include "kernels/base/fault_point.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;

// Longest a step may take. The largest steps seen (2,048 prefill rows of a 1B model on two cores)
// take 10 s; a step that takes 60 times as long is stuck.
constexpr auto kStepTimeout = 10min;
constexpr auto kStatsInterval = 1s;
constexpr auto kProgressInterval = 1s;         // of a step under way
constexpr double kCommunicationSample_s = 10;  // of steps, before their exchanges are judged

double peak_memory_bytes() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) * 1024;
}

ErrorInfo info_of(std::exception_ptr error) {
  try {
    std::rethrow_exception(error);
  } catch (const Error& known) {
    return known.info;
  } catch (const std::exception& other) {
    return {.code = ErrorCode::kInternal, .message = other.what()};
  }
}

}  // namespace

Worker::Worker(Replica& replica, std::function<void(Event)> emit,
               std::unique_ptr<Replica> reference)
    : replica_(replica),
      emit_(std::move(emit)),
      engine_(replica.limits(), make_batching_policy(replica.config().engine.batching),
              replica.backend(), *this) {
  if (reference == nullptr) return;
  reference_.emplace(
      std::move(reference), [this](bridge::Sample sample) { tell_sample(std::move(sample)); },
      [this](bridge::FailedSample sample) { on_failed(std::move(sample)); });
}

void Worker::start(bool has_weights) {
  thread_ = std::thread([this, has_weights] { run(has_weights); });
}

Worker::~Worker() {
  stop();
}

void Worker::stop() {
  if (!thread_.joinable()) return;
  send(Stop{.hand_back = false});
  thread_.join();
}

void Worker::join() {
  thread_.join();
}

void Worker::send(Command command) {
  {
    const std::lock_guard lock(mutex_);
    mailbox_.push_back(std::move(command));
  }
  wake_.notify_one();
}

void Worker::run(bool has_weights) {
  Event last = WorkerStopped{};
  try {
    WorkerReady ready{.pid = ::getpid(), .fingerprint = replica_.backend().info().fingerprint};
    if (has_weights) ready.weights_hash = replica_.backend().weights_hash();
    fault_at(FaultPoint::kWorkerLoaded);
    emit_(std::move(ready));
    work();
  } catch (...) {
    last = WorkerFailed{info_of(std::current_exception())};
  }
  finish_check();
  emit_(std::move(last));
}

void Worker::work() {
  while (take_commands()) {
    finish_switch();
    tell_capacity();
    tell_stats(/*now=*/false);
    if (!stands_still() && step()) {
      watch_prefill();
      continue;
    }
    finish_switch();
    tell_stats(/*now=*/true);  // idle: the numbers stand
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [&] { return !mailbox_.empty(); });
  }
}

// The reference policy waits until its samples fill a step, or nothing else can run.
bool Worker::step() {
  progress_due_ = std::chrono::steady_clock::now() + kProgressInterval;
  const auto is_interrupted = [this] {
    tell_progress();
    return must_stop();
  };
  const bool is_reference_due = reference_ && reference_->fills_a_step();
  if (!is_reference_due && engine_.has_work() &&
      engine_.step(kStepTimeout, is_interrupted) != Engine::StepOutcome::kNothingToDo) {
    return true;
  }
  if (!reference_ || reference_->num_waiting() == 0) return false;
  return reference_->step(kStepTimeout, is_interrupted) != Engine::StepOutcome::kNothingToDo;
}

// Steps planned ahead end before weights, policy or pages change under them.
void Worker::finish_steps() {
  engine_.finish_steps(kStepTimeout, [this] {
    tell_progress();
    return false;
  });
}

// Rank 0 gives a worker up that says nothing for a lease. What counts is that layers get done, not
// that this thread lives: it only waits for them.
void Worker::tell_progress() {
  const auto time = std::chrono::steady_clock::now();
  const int64_t num_layers =
      replica_.num_layers_run() + (reference_ ? reference_->num_layers_run() : 0);
  if (time < progress_due_ || num_layers == num_layers_told_) return;
  progress_due_ = time + kProgressInterval;
  num_layers_told_ = num_layers;
  emit_(StepProgress{});
}

// A step may take seconds, a stop may not: what was sampled before the step is handed back instead.
bool Worker::must_stop() {
  const std::lock_guard lock(mutex_);
  return std::ranges::any_of(
      mailbox_, [](const Command& command) { return std::holds_alternative<Stop>(command); });
}

bool Worker::take_commands() {
  do {
    std::deque<Command> commands;
    {
      const std::lock_guard lock(mutex_);
      commands.swap(mailbox_);
    }
    for (Command& command : commands) {
      std::visit([this](auto& known) { handle(known); }, command);
    }
  } while (has_next_phase());
  return !is_stopped_;
}

void Worker::tell_capacity() {
  const auto missing =
      engine_.num_wanted() - static_cast<int32_t>(engine_.num_open()) - num_pulled_;
  if (missing <= 0) return;
  num_pulled_ += missing;
  emit_(Pull{.num_samples = missing});
}

void Worker::tell_stats(bool now) {
  const auto time = std::chrono::steady_clock::now();
  if (!now && time < stats_due_) return;
  stats_due_ = time + kStatsInterval;
  emit_(WorkerStats{stats()});
  warn_of_communication();
}

// Once: where ranks that hold one model mostly wait for each other.
void Worker::warn_of_communication() {
  const double steps_s = engine_.state().counters.steps_s;
  const double share = replica_.communication_s() / steps_s;
  if (has_warned_of_communication_ || steps_s < kCommunicationSample_s || share < 0.5) return;
  has_warned_of_communication_ = true;
  spdlog::warn(
      "{:.0f} % of the time of steps goes into exchanges between the ranks that hold one model; "
      "a smaller engine.tensor_model_parallel_size would be faster",
      share * 100);
}

std::vector<std::pair<std::string, double>> Worker::stats() const {
  const EngineState& state = engine_.state();
  const EngineCounters& counters = state.counters;
  const auto used = state.pool.num_pages() - state.pool.num_available();
  return {
      {"num_running_seqs", static_cast<double>(state.running.size())},
      {"num_waiting_seqs", static_cast<double>(state.waiting.size())},
      {"num_preempted_seqs", static_cast<double>(state.waiting.num_started())},
      {"num_waiting_reference", static_cast<double>(reference_ ? reference_->num_waiting() : 0)},
      {"num_kv_pages", state.pool.num_pages()},
      {"num_kv_pages_used", used},
      {"num_kv_pages_cached", state.pool.num_idle()},
      {"num_steps", static_cast<double>(counters.num_steps)},
      {"num_preemptions", static_cast<double>(counters.num_preemptions)},
      {"num_rows_computed", static_cast<double>(counters.num_rows_computed)},
      {"num_pad_rows", static_cast<double>(counters.num_pad_rows)},
      {"num_rows_after_stop", static_cast<double>(counters.num_rows_after_stop)},
      {"num_tokens_generated", static_cast<double>(counters.num_tokens_generated)},
      {"num_prompt_tokens", static_cast<double>(counters.num_prompt_tokens)},
      {"num_samples", static_cast<double>(counters.num_samples)},
      {"num_tokens_recomputed", static_cast<double>(counters.num_tokens_recomputed)},
      {"prefix_cache_queries", static_cast<double>(counters.prefix_cache_queries)},
      {"prefix_cache_hits", static_cast<double>(counters.prefix_cache_hits)},
      {"steps_s", counters.steps_s},
      {"scheduling_s", counters.scheduling_s},
      {"communication_s", replica_.communication_s()},
      {"num_drafts", static_cast<double>(counters.num_drafts)},
      {"num_draft_tokens", static_cast<double>(counters.num_draft_tokens)},
      {"num_accepted_tokens", static_cast<double>(counters.num_accepted_tokens)},
      {"last_update_packing_ms", last_times_.packing_ms},
      {"last_update_pause_ms", last_times_.pause_ms},
      {"last_update_prefill_ms", last_prefill_ms_},
      {"held_bytes", static_cast<double>(held_bytes())},
      {"peak_memory_bytes", peak_memory_bytes()}};
}

// Carries out what waited for running samples to finish. While nothing runs they never would.
void Worker::finish_switch() {
  if (engine_.has_started_work() && !stands_still()) return;
  if (pending_commit_) {
    const CommitWeights commit = *std::exchange(pending_commit_, std::nullopt);
    engine_.set_admits(pending_pauses_.empty() && !pending_sleep_);
    switch_weights(commit);
  }
  // What is finished is handed out before the reference policy sleeps too.
  const bool is_scored = !reference_ || reference_->num_waiting() == 0 || stands_still();
  if (pending_sleep_ && is_scored) {
    const Sleep sleep = *std::exchange(pending_sleep_, std::nullopt);
    engine_.set_admits(pending_pauses_.empty());
    fall_asleep(sleep);
  }
  if (pending_pauses_.empty()) return;
  is_paused_ = true;
  for (const uint64_t ticket : std::exchange(pending_pauses_, {})) acknowledge(ticket, [] {});
}

void Worker::acknowledge(uint64_t ticket, const std::function<void()>& action) {
  bridge::Outcome outcome;
  try {
    action();
  } catch (const Error& error) {
    outcome = error.info;
  }
  emit_(Ack{.ticket = ticket, .error = std::move(outcome)});
}

void Worker::handle(AddGroups& command) {
  for (GroupRequest& group : command.groups) {
    num_pulled_ -= group.num_samples();  // below 0 where the group is larger than what was asked
    attempts_[{group.key.request_id, group.key.prompt_index}] = {group.attempt,
                                                                 group.num_samples()};
    engine_.add(std::move(group));
  }
  fault_at(FaultPoint::kGroupsTaken);
}

void Worker::handle(AddScores& command) {
  for (ScoreRequest& request : command.requests) engine_.add_score(std::move(request));
}

void Worker::handle(AbortSamples& command) {
  engine_.abort(command.request_id);
}

void Worker::handle(Pause& command) {
  if (command.in_flight == bridge::InFlight::kWait) {
    engine_.set_admits(false);
    pending_pauses_.push_back(command.ticket);
    return;
  }
  if (command.in_flight == bridge::InFlight::kAbort) engine_.abort(std::nullopt);
  finish_steps();
  is_paused_ = true;
  acknowledge(command.ticket, [] {});
}

void Worker::handle(Resume&) {
  is_paused_ = false;
  if (!pending_commit_ && !pending_sleep_) engine_.set_admits(true);
  // Resumed before it had paused.
  for (const uint64_t ticket : std::exchange(pending_pauses_, {})) acknowledge(ticket, [] {});
}

void Worker::handle(Sleep& command) {
  if (command.in_flight == bridge::InFlight::kKeep) return fall_asleep(command);
  if (command.in_flight == bridge::InFlight::kAbort) engine_.abort(std::nullopt);
  engine_.set_admits(false);
  pending_sleep_ = command;
}

void Worker::fall_asleep(const Sleep& command) {
  finish_check();
  finish_steps();
  acknowledge_with_held_bytes(command.ticket, [&] {
    engine_.sleep(command.level);
    if (reference_) reference_->sleep(kStepTimeout, [] { return false; });
    tell_stats(/*now=*/true);  // so that who is answered sees the last step counted
  });
}

void Worker::handle(WakeUp& command) {
  const kernels::MemoryTags tags{.weights = command.tags.weights,
                                 .kv_cache = command.tags.kv_cache};
  acknowledge_with_held_bytes(command.ticket, [&] {
    if (reference_) reference_->wake_up(tags);
    engine_.wake_up(tags);
  });
}

// A rank without room, or asked at the wrong time, is as it was. One that is broken ends: where it
// only answered, all others would sleep on with it.
void Worker::acknowledge_with_held_bytes(uint64_t ticket, const std::function<void()>& action) {
  Ack ack{.ticket = ticket};
  try {
    action();
  } catch (const Error& error) {
    const bool is_as_it_was = error.info.code == ErrorCode::kResourceExhausted ||
                              error.info.code == ErrorCode::kFailedPrecondition;
    if (!is_as_it_was) throw;
    ack.error = error.info;
  }
  ack.held_bytes = held_bytes();
  emit_(std::move(ack));
}

int64_t Worker::held_bytes() const {
  return replica_.backend().held_bytes() + (reference_ ? reference_->held_bytes() : 0);
}

void Worker::handle(Measure& command) {
  finish_steps();
  acknowledge(command.ticket, [&] {
    if (!command.batching.empty()) engine_.set_policy(make_batching_policy(command.batching));
    meter_.emplace(replica_.model(), replica_.dtype(), replica_.backend().info().kv);
    engine_.set_observer(&*meter_);
  });
}

void Worker::handle(TakeMeasurement& command) {
  Measured event{.ticket = command.ticket};
  if (meter_) event.measurement = meter_->take();
  event.measurement.profile = replica_.take_profile();
  for (const auto& [name, value] : stats()) event.measurement.stats[name] = value;
  emit_(std::move(event));
}

void Worker::handle(Stop& command) {
  if (command.hand_back) {
    if (reference_) reference_->give_up();
    is_stopped_ = true;  // what is handed back now is not scored any more
    engine_.abort(std::nullopt);
  }
  is_stopped_ = true;
}

void Worker::handle(Ping& command) {
  acknowledge(command.ticket, [] {});
}

void Worker::on_sample(bridge::Sample sample) {
  if (reference_ && !is_stopped_) return reference_->add(std::move(sample));
  tell_sample(std::move(sample));
}

void Worker::tell_sample(bridge::Sample sample) {
  const int32_t attempt = attempt_of(sample.key);
  emit_(SampleDone{std::move(sample), attempt});
}

void Worker::on_failed(bridge::FailedSample sample) {
  const int32_t attempt = attempt_of(sample.key);
  emit_(SampleFailed{std::move(sample), attempt});
}

// The attempt that a sample on its way out belongs to; forgotten with the group's last.
int32_t Worker::attempt_of(const bridge::SampleKey& key) {
  const auto found = attempts_.find({key.request_id, key.prompt_index});
  if (found == attempts_.end()) return 0;
  const int32_t attempt = found->second.number;
  if (--found->second.num_left == 0) attempts_.erase(found);
  return attempt;
}

void Worker::on_scored(uint64_t ticket, bridge::Outcome error, bridge::ScoredSequence scored) {
  emit_(Scored{.ticket = ticket, .error = std::move(error), .sequence = std::move(scored)});
}

}  // namespace rollpack::rollout
