// What the dispatcher tells of itself: weights, numbers, health; and the wish that it ends.
#include <algorithm>
#include <chrono>
#include <utility>

#include "rollout/cluster/dispatcher.h"

namespace rollpack::rollout {

int64_t Dispatcher::weight_version() const {
  const std::lock_guard lock(mutex_);
  return weights_.version;
}

bridge::WeightsInUse Dispatcher::weights_in_use() const {
  const std::lock_guard lock(mutex_);
  return weights_;
}

std::optional<int64_t> Dispatcher::awaited_weight_version() const {
  const std::lock_guard lock(mutex_);
  return awaited_version_;
}

Dispatcher::Numbers Dispatcher::stats() const {
  std::vector<std::shared_ptr<const std::map<std::string, double>>> of_workers;
  std::map<std::string, double> sums = own_stats(of_workers);
  if (kept_ != nullptr) {
    for (auto& [name, value] : kept_->numbers()) sums[name] = value;
  }
  for (const auto& of_worker : of_workers) {
    for (const auto& [name, value] : *of_worker) {
      double& sum = sums[name];
      sum = name.starts_with("last_update_") ? std::max(sum, value) : sum + value;
    }
  }
  return {sums.begin(), sums.end()};
}

std::map<std::string, double> Dispatcher::own_stats(
    std::vector<std::shared_ptr<const std::map<std::string, double>>>& of_workers) const {
  const std::lock_guard lock(mutex_);
  of_workers.reserve(workers_.size());
  for (const WorkerState& worker : workers_) of_workers.push_back(worker.stats);
  std::map<std::string, double> sums;
  sums["num_workers"] = static_cast<double>(all_workers().size());
  sums["num_worker_deaths"] = static_cast<double>(num_worker_deaths_);
  sums["num_replacements"] = static_cast<double>(num_replacements_);
  sums["num_groups_requeued"] = static_cast<double>(num_groups_requeued_);
  sums["num_groups_convicted"] = static_cast<double>(num_groups_convicted_);
  sums["num_samples_stop"] = static_cast<double>(num_finished_[0]);
  sums["num_samples_length"] = static_cast<double>(num_finished_[1]);
  sums["num_samples_abort"] = static_cast<double>(num_finished_[2]);
  sums["num_samples_failed"] = static_cast<double>(num_failed_);
  sums["num_weight_updates"] = static_cast<double>(num_weight_updates_);
  sums["num_queued_samples"] = static_cast<double>(ledger_.num_queued_samples());
  sums["is_paused"] = is_paused_ ? 1 : 0;
  sums["is_asleep"] = asleep_.any() ? 1 : 0;
  sums["is_weights_asleep"] = asleep_.weights ? 1 : 0;
  sums["is_kv_cache_asleep"] = asleep_.kv_cache ? 1 : 0;
  sums["needs_weights"] = needs_weights_ ? 1 : 0;
  double longest_silence_s = 0;
  for (const WorkerState& worker : workers_) {
    longest_silence_s = std::max(longest_silence_s, silence_s(worker));
  }
  sums["longest_silence_s"] = longest_silence_s;
  sums["num_requests"] = static_cast<double>(num_requests_);
  sums["num_open_samples"] = static_cast<double>(ledger_.num_open_samples());
  sums["num_queued_groups"] = static_cast<double>(ledger_.num_queued_groups());
  sums["num_late_samples_dropped"] = static_cast<double>(ledger_.num_dropped());
  sums["weight_version"] = static_cast<double>(weights_.version);
  return sums;
}

std::vector<Dispatcher::WorkerNumbers> Dispatcher::worker_numbers() const {
  const std::lock_guard lock(mutex_);
  std::vector<WorkerNumbers> all;
  for (const int32_t worker : all_workers()) {
    all.push_back({worker, silence_s(workers_[worker]), workers_[worker].stats});
  }
  return all;
}

// Who owes nothing, or is gone, is not silent.
double Dispatcher::silence_s(const WorkerState& worker) const {
  if (!worker.takes_part() || !worker.is_ready || !worker.owes()) return 0;
  return std::chrono::duration<double>(recovery_.now() - worker.last_progress).count();
}

bridge::Outcome Dispatcher::health() const {
  const std::lock_guard lock(mutex_);
  return fatal_;
}

void Dispatcher::shutdown() {
  std::function<void()> on_end;
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(is_ending_, true)) return;
    on_end = on_end_;
  }
  if (on_end) on_end();
}

}  // namespace rollpack::rollout
