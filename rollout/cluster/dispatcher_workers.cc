// The dispatcher's other side: workers, what they report, and commands that all of them must
// answer.
#include <algorithm>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <spdlog/spdlog.h>

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
    std::visit([&](auto& known) { on_event(worker, known, effects); }, event);
  }
  changed_.notify_all();
  run(effects);
}

void Dispatcher::lose_worker(int32_t worker, ErrorInfo error) {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    if (workers_[worker].is_stopped) return;
    workers_[worker].is_stopped = true;
    spdlog::error("{}", format_error(error));  // at once: mpirun may end this process any moment
    end_with(std::move(error), effects);
  }
  changed_.notify_all();
  run(effects);
}

// Without recovery the loss of a worker ends the job: everything open fails with its error.
void Dispatcher::end_with(ErrorInfo error, Effects& effects) {
  if (fatal_) return;
  fatal_ = error;
  for (auto& [ticket, collection] : std::exchange(collections_, {})) {
    if (!collection->done) continue;
    effects.push_back([done = std::move(collection->done), error] { done(error, -1); });
  }
  for (auto& [ticket, place] : std::exchange(scores_, {})) {
    ScoreBatch& batch = *place.first;
    if (!batch.done) continue;
    effects.push_back([done = std::exchange(batch.done, nullptr), error] { done(error, {}); });
  }
  for (auto& [ticket, sum] : std::exchange(measurements_, {})) {
    if (!sum->done) continue;
    effects.push_back([done = std::exchange(sum->done, nullptr), error] { done(error, {}); });
  }
  if (!std::exchange(is_ending_, true) && on_end_) effects.push_back(on_end_);
}

void Dispatcher::wait_ready(std::chrono::steady_clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  const auto all_ready = [&] {
    return fatal_ || std::ranges::all_of(workers_, [](const auto& w) { return w.is_ready; });
  };
  const bool in_time = changed_.wait_until(lock, deadline, all_ready);
  if (fatal_) throw Error(*fatal_);
  if (in_time) return;
  std::vector<size_t> missing;
  for (size_t i = 0; i < workers_.size(); ++i) {
    if (!workers_[i].is_ready) missing.push_back(i);
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
  for (const WorkerState& worker : workers_) {
    if (!worker.is_stopped) worker.link->send(Stop{.hand_back = hand_back});
  }
  changed_.wait_until(lock, deadline, [&] {
    return std::ranges::all_of(workers_, [](const auto& w) { return w.is_stopped; });
  });
}

std::vector<int32_t> Dispatcher::all_workers() const {
  std::vector<int32_t> all(workers_.size());
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
  return all;
}

void Dispatcher::broadcast(const std::vector<int32_t>& workers, const MakeCommand& make,
                           std::function<void(bridge::Outcome, int fd)> done) {
  auto collection = std::make_shared<Collection>();
  collection->num_missing = workers.size();
  collection->done = std::move(done);
  for (const int32_t worker : workers) {
    const uint64_t ticket = ++num_tickets_;
    collections_[ticket] = collection;
    workers_[worker].link->send(make(ticket));
  }
}

// ---- events
// --------------------------------------------------------------------------------------

void Dispatcher::on_event(int32_t worker, WorkerReady& event, Effects& effects) {
  if (event.fingerprint != fingerprint_) {
    end_with({.code = ErrorCode::kFailedPrecondition,
              .field = fmt::format("rank {} fingerprint", worker),
              .value = event.fingerprint,
              .allowed = fingerprint_,
              .message = "all ranks must run the same backend: their bits would differ"},
             effects);
    return;
  }
  workers_[worker].is_ready = true;
}

void Dispatcher::on_event(int32_t worker, Pull& event, Effects&) {
  WorkerState& state = workers_[worker];
  askers_.erase({state.num_outstanding, worker});
  state.num_wanted += event.num_samples;
  if (state.num_wanted > 0) askers_.emplace(state.num_outstanding, worker);
  dispatch();
}

void Dispatcher::on_event(int32_t worker, SampleDone& event, Effects& effects) {
  const std::optional<int64_t> tokens = ledger_.commit(event.sample.key, worker);
  if (!tokens) return;
  release_tokens(worker, *tokens);
  effects.push_back([this, sample = std::make_shared<bridge::Sample>(std::move(event.sample))] {
    sink_->commit(std::move(*sample));
  });
}

void Dispatcher::on_event(int32_t worker, SampleFailed& event, Effects& effects) {
  const std::optional<int64_t> tokens = ledger_.commit(event.sample.key, worker);
  if (!tokens) return;
  release_tokens(worker, *tokens);
  effects.push_back([this, sample = std::move(event.sample)] { sink_->fail(sample); });
}

void Dispatcher::release_tokens(int32_t worker, int64_t num_tokens) {
  WorkerState& state = workers_[worker];
  const bool asks = askers_.erase({state.num_outstanding, worker}) > 0;
  state.num_outstanding -= num_tokens;
  if (asks) askers_.emplace(state.num_outstanding, worker);
}

void Dispatcher::on_event(int32_t, Scored& event, Effects& effects) {
  const auto found = scores_.find(event.ticket);
  if (found == scores_.end()) return;
  const auto [batch, index] = found->second;
  scores_.erase(found);
  if (event.error && !batch->error) batch->error = event.error;
  batch->results[index] = std::move(event.sequence);
  if (--batch->num_missing > 0) return;
  effects.push_back([batch] { batch->done(batch->error, std::move(batch->results)); });
}

void Dispatcher::on_event(int32_t, Ack& event, Effects& effects) {
  const auto found = collections_.find(event.ticket);
  if (found == collections_.end()) return;
  const std::shared_ptr<Collection> collection = found->second;
  collections_.erase(found);
  if (event.error && !collection->error) collection->error = event.error;
  if (event.fd >= 0) collection->fd = event.fd;
  if (--collection->num_missing > 0) return;
  effects.push_back([collection] { collection->done(collection->error, collection->fd); });
}

void Dispatcher::on_event(int32_t worker, WorkerStats& event, Effects&) {
  for (const auto& [name, value] : event.values) workers_[worker].stats[name] = value;
}

void Dispatcher::measure(const std::string& batching, bridge::OutcomeCallback done) {
  const std::lock_guard lock(mutex_);
  if (!batching.empty()) ledger_.set_longest_first(wants_longest_first(batching));
  broadcast(
      all_workers(),
      [&](uint64_t ticket) {
        return Measure{ticket, batching};
      },
      [done = std::move(done)](bridge::Outcome error, int) { done(std::move(error)); });
}

void Dispatcher::take_measurement(MeasurementCallback done) {
  const std::lock_guard lock(mutex_);
  auto sum = std::make_shared<MeasurementSum>();
  sum->num_missing = workers_.size();
  sum->done = std::move(done);
  for (const WorkerState& worker : workers_) {
    const uint64_t ticket = ++num_tickets_;
    measurements_[ticket] = sum;
    worker.link->send(TakeMeasurement{ticket});
  }
}

void Dispatcher::on_event(int32_t, Measured& event, Effects& effects) {
  const auto found = measurements_.find(event.ticket);
  if (found == measurements_.end()) return;
  const std::shared_ptr<MeasurementSum> sum = found->second;
  measurements_.erase(found);
  sum->sum.add(event.measurement);
  if (--sum->num_missing > 0) return;
  effects.push_back([sum] { sum->done(std::nullopt, std::move(sum->sum)); });
}

void Dispatcher::on_event(int32_t worker, WorkerStopped&, Effects&) {
  workers_[worker].is_stopped = true;
}

void Dispatcher::on_event(int32_t worker, WorkerFailed& event, Effects& effects) {
  workers_[worker].is_stopped = true;
  ErrorInfo error = event.error;
  error.message =
      fmt::format("rank {} failed{}{}", worker, error.message.empty() ? "" : ": ", error.message);
  end_with(std::move(error), effects);
}

}  // namespace rollpack::rollout
