// The dispatcher's other side: workers, what they report, and commands that all of them must
// answer.
#include <algorithm>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "kernels/base/error.h"
#include "rollout/batching/batching_policy.h"
#include "rollout/cluster/dispatcher.h"

namespace rollpack::rollout {

int32_t Dispatcher::add_worker(std::shared_ptr<WorkerLink> link) {
  const std::lock_guard lock(mutex_);
  workers_.push_back({.link = std::move(link)});
  return static_cast<int32_t>(workers_.size()) - 1;
}

void Dispatcher::handle(int32_t worker, Event event) {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    WorkerState& state = workers_[worker];
    state.last_progress = recovery_.now();
    if (std::exchange(state.is_doubted, false) && asks(worker)) {
      askers_.emplace(state.num_outstanding, worker);
      dispatch();
    }
    // Of a lost worker only samples are looked at: the ledger drops and counts them.
    const bool is_sample = std::holds_alternative<SampleDone>(event) ||
                           std::holds_alternative<SampleKept>(event) ||
                           std::holds_alternative<SampleFailed>(event);
    if (!state.is_lost || is_sample) {
      std::visit([&](auto& known) { on_event(worker, known, effects); }, event);
    }
  }
  changed_.notify_all();
  run(effects);
}

void Dispatcher::wait_ready(std::chrono::steady_clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  const auto all_ready = [&] {
    return fatal_ ||
           std::ranges::all_of(workers_, [](const auto& w) { return w.is_ready || w.is_lost; });
  };
  const bool in_time = changed_.wait_until(lock, deadline, all_ready);
  if (fatal_) throw Error(*fatal_);
  if (in_time) return;
  std::vector<size_t> missing;
  for (size_t i = 0; i < workers_.size(); ++i) {
    if (!workers_[i].is_ready && !workers_[i].is_lost) missing.push_back(i);
  }
  throw Error({.code = ErrorCode::kDeadlineExceeded,
               .field = "ranks",
               .value = fmt::format("{}", fmt::join(missing, ", ")),
               .message = "did not become ready in time"});
}

void Dispatcher::stop(bool hand_back, std::chrono::steady_clock::time_point deadline) {
  if (hand_back) abort(std::nullopt);
  std::unique_lock lock(mutex_);
  is_ending_ = true;
  for (WorkerState& worker : workers_) {
    if (worker.is_stopped) continue;
    worker.link->send(Stop{.hand_back = hand_back});
    if (!worker.is_joining) continue;
    worker.is_stopped = true;  // it holds nothing, and may be loading for minutes yet
    worker.link->kill();
  }
  changed_.wait_until(lock, deadline, [&] {
    return std::ranges::all_of(workers_, [](const auto& w) { return w.is_stopped; });
  });
}

std::vector<int32_t> Dispatcher::all_workers() const {
  std::vector<int32_t> all;
  for (size_t i = 0; i < workers_.size(); ++i) {
    if (workers_[i].takes_part()) all.push_back(static_cast<int32_t>(i));
  }
  return all;
}

uint64_t Dispatcher::new_ticket(int32_t worker) {
  expect_progress(worker);
  workers_[worker].tickets.insert(++num_tickets_);
  return num_tickets_;
}

// Who had nothing to do has not been silent: its lease begins with the work.
void Dispatcher::expect_progress(int32_t worker) {
  if (!workers_[worker].owes()) workers_[worker].last_progress = recovery_.now();
}

std::shared_ptr<Dispatcher::Collection> Dispatcher::broadcast(
    const std::vector<int32_t>& workers, const MakeCommand& make,
    std::function<void(bridge::Outcome, int fd)> done, Effects& effects) {
  auto collection = std::make_shared<Collection>();
  collection->done = std::move(done);
  for (const int32_t worker : workers) {
    if (workers_[worker].takes_part()) ask(worker, collection, make);
  }
  if (collection->num_missing == 0) finish(collection, effects);
  return collection;
}

void Dispatcher::ask(int32_t worker, const std::shared_ptr<Collection>& collection,
                     const MakeCommand& make) {
  ++collection->num_missing;
  const uint64_t ticket = new_ticket(worker);
  collections_[ticket] = collection;
  workers_[worker].link->send(make(ticket));
}

void Dispatcher::finish(const std::shared_ptr<Collection>& collection, Effects& effects) {
  if (collection->num_answers == 0 && !collection->error) {
    collection->error = ErrorInfo{.code = ErrorCode::kUnavailable,
                                  .field = "workers",
                                  .value = "none that could answer",
                                  .message = "those that were asked are lost"};
  }
  effects.push_back([collection] { collection->done(collection->error, collection->fd); });
}

// ---- events
// --------------------------------------------------------------------------------------

void Dispatcher::on_event(int32_t worker, WorkerReady& event, Effects& effects) {
  if (event.fingerprint != fingerprint_) {
    const ErrorInfo error{
        .code = ErrorCode::kFailedPrecondition,
        .field = fmt::format("rank {} fingerprint", worker),
        .value = event.fingerprint,
        .allowed = fingerprint_,
        .message = "all ranks must run the same backend: their bits would differ"};
    return workers_[worker].is_joining ? give_up(worker, error, effects) : end_with(error, effects);
  }
  workers_[worker].weights_hash = event.weights_hash;
  if (!workers_[worker].is_joining && event.weights_hash && event.weights_hash != weights_.hash) {
    return end_with(other_weights_error(worker, weights_), effects);
  }
  workers_[worker].is_ready = true;
  if (workers_[worker].is_joining) begin_join(worker, effects);
}

void Dispatcher::on_event(int32_t worker, Pull& event, Effects&) {
  WorkerState& state = workers_[worker];
  if (state.is_stopped) return;
  askers_.erase({state.num_outstanding, worker});
  state.num_wanted += event.num_samples;
  if (asks(worker)) askers_.emplace(state.num_outstanding, worker);
  dispatch();
}

void Dispatcher::on_event(int32_t worker, SampleDone& event, Effects& effects) {
  bridge::Sample& done = event.sample;
  if (goes_on(done.key, done.finish_reason, worker, event.attempt)) return;
  if (!count_sample(done.key, done.finish_reason, worker, event.attempt)) return;
  if (is_cut(done.key)) bridge::end_as_aborted(done);
  effects.push_back([this, sample = std::make_shared<bridge::Sample>(std::move(event.sample))] {
    sink_->commit(std::move(*sample));
  });
}

void Dispatcher::on_event(int32_t worker, SampleKept& event, Effects&) {
  Verdict verdict = Verdict::kDrop;
  if (!goes_on(event.key, event.finish_reason, worker, event.attempt) &&
      count_sample(event.key, event.finish_reason, worker, event.attempt)) {
    verdict = is_cut(event.key) ? Verdict::kCommitAsAborted : Verdict::kCommit;
  }
  if (kept_ != nullptr) kept_->decide(worker, event.key, event.attempt, verdict);
}

void Dispatcher::on_event(int32_t worker, SampleWithdrawn& event, Effects&) {
  if (kept_ != nullptr) kept_->decide(worker, event.key, event.attempt, Verdict::kDrop);
}

bool Dispatcher::count_sample(const bridge::SampleKey& key, bridge::FinishReason reason,
                              int32_t worker, int32_t attempt) {
  const std::optional<int64_t> tokens = ledger_.commit(key, worker, attempt);
  if (!tokens) return false;
  ++num_finished(reason);
  workers_[worker].has_committed = true;
  if (workers_[worker].is_replacement) num_fruitless_ = 0;
  release_tokens(worker, *tokens);
  return true;
}

void Dispatcher::on_event(int32_t worker, SampleFailed& event, Effects& effects) {
  const std::optional<int64_t> tokens = ledger_.commit(event.sample.key, worker, event.attempt);
  if (!tokens) return;
  ++num_failed_;
  release_tokens(worker, *tokens);
  effects.push_back([this, sample = std::move(event.sample)] { sink_->fail(sample); });
}

void Dispatcher::release_tokens(int32_t worker, int64_t num_tokens) {
  WorkerState& state = workers_[worker];
  askers_.erase({state.num_outstanding, worker});
  state.num_outstanding -= num_tokens;
  if (asks(worker)) askers_.emplace(state.num_outstanding, worker);
  if (quarantine_ == worker && state.num_outstanding == 0) dispatch();
}

void Dispatcher::on_event(int32_t worker, Scored& event, Effects& effects) {
  workers_[worker].score_tickets.erase(event.ticket);
  const auto found = scores_.find(event.ticket);
  if (found == scores_.end()) return;
  const auto [batch, index] = found->second;
  scores_.erase(found);
  finish_score(batch, index, std::move(event), effects);
}

void Dispatcher::finish_score(const std::shared_ptr<ScoreBatch>& batch, size_t index, Scored event,
                              Effects& effects) {
  if (event.error && !batch->error) batch->error = event.error;
  batch->results[index] = std::move(event.sequence);
  if (--batch->num_missing > 0) return;
  effects.push_back([batch] { batch->done(batch->error, std::move(batch->results)); });
}

void Dispatcher::on_event(int32_t worker, Ack& event, Effects& effects) {
  workers_[worker].tickets.erase(event.ticket);
  const auto found = collections_.find(event.ticket);
  if (found == collections_.end()) return;
  const std::shared_ptr<Collection> collection = found->second;
  collections_.erase(found);
  if (event.weights_hash) workers_[worker].weights_hash = event.weights_hash;
  if (event.held_bytes) {
    WorkerStats told{{{"held_bytes", static_cast<double>(*event.held_bytes)}}};
    on_event(worker, told, effects);
  }
  update_times_.packing_ms = std::max(update_times_.packing_ms, event.times.packing_ms);
  update_times_.pause_ms = std::max(update_times_.pause_ms, event.times.pause_ms);
  // Before any sample that it draws with them: those follow on the same link.
  if (!event.error && collection->weights_hash && event.weights_hash != collection->weights_hash) {
    event.error = other_weights_error(
        worker, {.version = update_version_.value_or(0), .hash = *collection->weights_hash});
  }
  if (event.error && collection->must_succeed && recovery_.is_on) {
    give_up(worker, *event.error, effects);
  } else {
    ++collection->num_answers;
    if (event.error && !collection->error) collection->error = event.error;
    if (event.fd >= 0) collection->fd = event.fd;
    if (collection->pauses) workers_[worker].is_paused = true;
    if (collection->sleeps) workers_[worker].is_asleep = true;
  }
  if (--collection->num_missing == 0) finish(collection, effects);
}

void Dispatcher::on_event(int32_t, StepProgress&, Effects&) {}

void Dispatcher::on_event(int32_t worker, WorkerStats& event, Effects&) {
  auto stats = std::make_shared<std::map<std::string, double>>(*workers_[worker].stats);
  for (const auto& [name, value] : event.values) (*stats)[name] = value;
  workers_[worker].stats = std::move(stats);
}

void Dispatcher::measure(const std::string& batching, bridge::OutcomeCallback done) {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    if (!batching.empty()) ledger_.set_longest_first(wants_longest_first(batching));
    broadcast(
        all_workers(),
        [&](uint64_t ticket) {
          return Measure{ticket, batching};
        },
        [done = std::move(done)](bridge::Outcome error, int) { done(std::move(error)); }, effects);
  }
  run(effects);
}

void Dispatcher::take_measurement(MeasurementCallback done) {
  const std::lock_guard lock(mutex_);
  auto sum = std::make_shared<MeasurementSum>();
  const std::vector<int32_t> live = all_workers();
  sum->num_missing = live.size();
  sum->done = std::move(done);
  for (const int32_t worker : live) {
    const uint64_t ticket = new_ticket(worker);
    measurements_[ticket] = sum;
    workers_[worker].link->send(TakeMeasurement{ticket});
  }
}

void Dispatcher::on_event(int32_t worker, Measured& event, Effects& effects) {
  workers_[worker].tickets.erase(event.ticket);
  const auto found = measurements_.find(event.ticket);
  if (found == measurements_.end()) return;
  const std::shared_ptr<MeasurementSum> sum = found->second;
  measurements_.erase(found);
  sum->sum.add(event.measurement);
  if (--sum->num_missing > 0) return;
  effects.push_back([sum] { sum->done(std::nullopt, std::move(sum->sum)); });
}

void Dispatcher::on_event(int32_t worker, WorkerStopped&, Effects&) {
  askers_.erase({workers_[worker].num_outstanding, worker});
  workers_[worker].is_stopped = true;
}

// Before it is ready a rank fails for what all ranks have: the configuration, the model.
void Dispatcher::on_event(int32_t worker, WorkerFailed& event, Effects& effects) {
  ErrorInfo error = event.error;
  error.message =
      fmt::format("rank {} failed{}{}", worker, error.message.empty() ? "" : ": ", error.message);
  if (workers_[worker].is_ready || workers_[worker].is_joining)
    return give_up(worker, std::move(error), effects);
  workers_[worker].is_stopped = true;
  end_with(std::move(error), effects);
}

}  // namespace rollpack::rollout
