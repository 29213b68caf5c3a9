// The dispatcher's losses: who is given up and when, what becomes of what it held, and the end when
// nobody is left.
#include <algorithm>
#include <utility>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "kernels/base/error.h"
#include "rollout/cluster/dispatcher.h"

namespace rollpack::rollout {
namespace {

// Loading a large model from a cold disk takes minutes; longer than this, a replacement is stuck.
constexpr std::chrono::minutes kJoinTimeout{30};

// Sums that a lost worker has added to stay; what it had at the moment is gone with it.
constexpr const char* kGauges[] = {
    "num_running_seqs", "num_waiting_seqs",       "num_preempted_seqs",   "num_waiting_reference",
    "num_kv_pages",     "num_kv_pages_used",      "num_kv_pages_cached",  "peak_memory_bytes",
    "held_bytes",       "last_update_packing_ms", "last_update_pause_ms", "last_update_prefill_ms"};

ErrorInfo culprit_error(const GroupRequest& request, const ErrorInfo& last) {
  return {.code = ErrorCode::kInternal,
          .field = "prompt",
          .value = request.key.prompt_id.text,
          .origin = fmt::format("request {}, prompt {}", request.key.request_id,
                                request.key.prompt_index),
          .message = fmt::format("{} workers were lost while they worked on it, the last one: {}",
                                 Ledger::kDeathsOfCulprit, format_error(last))};
}

ErrorInfo no_worker_error(const GroupRequest& request, const ErrorInfo& last) {
  ErrorInfo error = culprit_error(request, last);
  error.message = fmt::format(
      "{} workers were lost while they worked on it, and no other process is left to try it in: {}",
      Ledger::kDeathsOfSuspect, format_error(last));
  return error;
}

}  // namespace

void Dispatcher::lose_worker(int32_t worker, ErrorInfo error) {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    give_up(worker, std::move(error), effects);
  }
  changed_.notify_all();
  run(effects);
}

void Dispatcher::check_leases() {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    const TimePoint now = recovery_.now();
    const bool was_stopped = now - last_check_ > recovery_.lease / 2;
    last_check_ = now;
    for (int32_t worker = 0; worker < static_cast<int32_t>(workers_.size()); ++worker) {
      WorkerState& state = workers_[worker];
      if (state.is_stopped) continue;
      if (was_stopped) state.last_progress = now;
      const bool is_loading = state.is_joining && !state.is_ready;
      const bool is_watched = state.is_ready && state.owes() && state.link->is_own_process();
      if (!is_loading && !is_watched) continue;
      if (now - state.last_progress <= (is_loading ? kJoinTimeout : recovery_.lease)) continue;
      give_up(
          worker,
          {.code = ErrorCode::kDeadlineExceeded,
           .field = fmt::format("rank {}", worker),
           .value = fmt::format("no progress for {:.1f} s",
                                std::chrono::duration<double>(now - state.last_progress).count()),
           .allowed = fmt::format("some within cluster.lease_s = {}",
                                  std::chrono::duration<double>(recovery_.lease).count())},
          effects);
    }
  }
  changed_.notify_all();
  run(effects);
}

void Dispatcher::give_up(int32_t worker, ErrorInfo error, Effects& effects) {
  WorkerState& state = workers_[worker];
  if (state.is_stopped) return;
  spdlog::error("{}", format_error(error));  // at once: mpirun may end this process any moment
  askers_.erase({state.num_outstanding, worker});
  state.is_stopped = true;
  if (!recovery_.is_on) return end_with(std::move(error), effects);
  state.is_lost = true;
  state.num_wanted = 0;
  state.num_outstanding = 0;
  auto stats = std::make_shared<std::map<std::string, double>>(*state.stats);
  for (const char* gauge : kGauges) stats->erase(gauge);
  state.stats = std::move(stats);
  if (quarantine_ == worker) quarantine_.reset();
  if (kept_ != nullptr) kept_->forget(worker);
  ++num_worker_deaths_;
  effects.push_back([link = state.link] { link->kill(); });

  const Ledger::Fenced fenced = ledger_.fence(worker, /*blames=*/!state.is_asleep);
  num_groups_requeued_ += fenced.num_requeued;
  num_groups_convicted_ += static_cast<int64_t>(fenced.culprits.size());
  for (const GroupRequest& request : fenced.aborted) commit_empty(request, effects);
  for (const GroupRequest& request : fenced.culprits) {
    fail_open(request, culprit_error(request, error), effects);
  }
  replace(state, effects);
  doubt_node(state.link->node());
  spdlog::warn("{} workers left, {} on their way; {} groups of the lost one are queued again",
               all_workers().size(), num_starting_, fenced.num_requeued);
  state.tickets.merge(state.score_tickets);
  for (const uint64_t ticket : std::exchange(state.tickets, {})) {
    give_up_ticket(ticket, error, effects);
  }
  end_if_nobody_is_left(error, effects);
  dispatch();
}

// With one of its ranks a whole node may be gone: those beside it get no work that would be lost
// once more, and blamed for it, until they have said something. Asked, for the idle say nothing.
void Dispatcher::doubt_node(int node) {
  if (node == 0) return;  // the ends of processes here are seen one by one
  for (const int32_t worker : all_workers()) {
    WorkerState& state = workers_[worker];
    if (state.is_doubted || !state.is_ready || state.link->node() != node) continue;
    askers_.erase({state.num_outstanding, worker});
    state.is_doubted = true;
    auto answer = std::make_shared<Collection>();
    answer->done = [](bridge::Outcome, int) {};
    ask(worker, answer, [](uint64_t ticket) { return Ping{ticket}; });
  }
}

// Nobody: neither for all, nor beside rank 0 for suspects. Who is about to join is nobody where the
// weights were dropped: an update that brings others would find no rank to take it.
void Dispatcher::end_if_nobody_is_left(const ErrorInfo& last, Effects& effects) {
  // In mid-switch others are about to have them.
  const bool nobody_takes_weights = needs_weights_ && !is_switching_ && !can_take_weights();
  if (has_worker_processes() && !nobody_takes_weights) return;
  for (const GroupRequest& request : ledger_.take_suspects()) {
    ++num_groups_convicted_;
    fail_open(request, no_worker_error(request, last), effects);
  }
  if (!all_workers().empty() && !nobody_takes_weights) return;
  end_with({.code = ErrorCode::kUnavailable,
            .field = "workers",
            .value = "none left",
            .message = "the last one: " + format_error(last)},
           effects);
}

// What a lost worker had still to answer.
void Dispatcher::give_up_ticket(uint64_t ticket, const ErrorInfo& error, Effects& effects) {
  if (const auto found = collections_.find(ticket); found != collections_.end()) {
    const std::shared_ptr<Collection> collection = found->second;
    collections_.erase(found);
    if (--collection->num_missing == 0) finish(collection, effects);
    return;
  }
  if (const auto found = measurements_.find(ticket); found != measurements_.end()) {
    const std::shared_ptr<MeasurementSum> sum = found->second;
    measurements_.erase(found);
    if (sum->done) {
      effects.push_back([done = std::exchange(sum->done, nullptr), error] { done(error, {}); });
    }
    return;
  }
  const auto found = scores_.find(ticket);
  if (found == scores_.end()) return;
  const auto [batch, index] = found->second;
  scores_.erase(found);
  const bool is_tried_again =
      ++batch->num_deaths[index] < Ledger::kDeathsOfCulprit && !all_workers().empty();
  if (is_tried_again) return send_score(batch, index);
  Scored failed{.error = error, .sequence = {.id = batch->sequences[index].id}};
  finish_score(batch, index, std::move(failed), effects);
}

// Without any worker nothing goes on: everything that waits fails with the error.
void Dispatcher::end_with(ErrorInfo error, Effects& effects) {
  if (fatal_) return;
  fatal_ = error;
  tell_change(effects);
  for (auto& [ticket, collection] : std::exchange(collections_, {})) {
    if (!collection->done) continue;
    effects.push_back(
        [done = std::exchange(collection->done, nullptr), error] { done(error, -1); });
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

// Replacements on their way count, and those that are started when the job wakes up or has weights.
bool Dispatcher::has_worker_processes() const {
  const bool can_start =
      num_fruitless_ < kMaxFruitless && (needs_weights_ || kept_weights_.is_complete());
  return num_starting_ > 0 || (!is_awake() && can_start && !unreplaced_.empty()) ||
         std::ranges::any_of(workers_, [](const WorkerState& worker) {
           return !worker.is_stopped && worker.link->is_own_process();
         });
}

// A suspect runs alone, so that it alone is to blame, and in a process of its own, so that it
// cannot take this one along. The worker with the least at hand is kept free for it.
void Dispatcher::dispatch_suspect() {
  const std::optional<Ledger::GroupKey> key = ledger_.next_suspect();
  if (!key) {
    if (!quarantine_ || workers_[*quarantine_].num_outstanding > 0) return;
    const int32_t worker = *std::exchange(quarantine_, std::nullopt);
    if (asks(worker)) askers_.emplace(workers_[worker].num_outstanding, worker);
    return;
  }
  if (!quarantine_) {
    for (const int32_t worker : all_workers()) {
      const WorkerState& state = workers_[worker];
      if (!state.link->is_own_process() || !state.is_ready || state.is_doubted) continue;
      if (quarantine_ && workers_[*quarantine_].num_outstanding <= state.num_outstanding) continue;
      quarantine_ = worker;
    }
    if (!quarantine_) return;
    askers_.erase({workers_[*quarantine_].num_outstanding, *quarantine_});
  }
  WorkerState& worker = workers_[*quarantine_];
  if (worker.num_outstanding > 0) return;
  AddGroups command;
  command.groups.push_back(take_group(*key, *quarantine_));
  worker.link->send(std::move(command));
}

void Dispatcher::commit_empty(const GroupRequest& request, Effects& effects) {
  num_finished(bridge::FinishReason::kAbort) += request.num_samples();
  for (int32_t i = 0; i < request.num_samples(); ++i) {
    bridge::Sample sample{.key = request.key,
                          .prompt_ids = request.prompt_ids,
                          .finish_reason = bridge::FinishReason::kAbort,
                          .temperature = request.sampling.params.temperature};
    sample.key.sample_index = request.sample_index(i);
    effects.push_back([this, sample = std::move(sample)] { sink_->commit(sample); });
  }
}

void Dispatcher::fail_open(const GroupRequest& request, const ErrorInfo& error, Effects& effects) {
  num_failed_ += request.num_samples();
  for (int32_t i = 0; i < request.num_samples(); ++i) {
    bridge::FailedSample failed{request.key, error};
    failed.key.sample_index = request.sample_index(i);
    effects.push_back([this, failed = std::move(failed)] { sink_->fail(failed); });
  }
}

}  // namespace rollpack::rollout
