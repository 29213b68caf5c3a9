// The dispatcher after a restart: what was accepted in a life before this one is queued again,
// under its old names, and waits for the weights it is to be made with.
#include <algorithm>
#include <utility>

#include <spdlog/spdlog.h>

#include "rollout/cluster/dispatcher.h"

namespace rollpack::rollout {

void Dispatcher::restore(RequestLog& log, RestoredRequests restored) {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    log_ = &log;
    num_requests_ = restored.num_requests;
    const bool has_other_weights = restored.weight_version != weights_.version;
    if (has_other_weights && !restored.groups.empty()) {
      awaited_version_ = restored.weight_version;
      spdlog::warn("{} groups wait for weights of version {}: update_weights() or resume()",
                   restored.groups.size(), restored.weight_version);
    } else if (has_other_weights) {
      log_->switched(weights_.version);
    }
    for (RestoredGroup& group : restored.groups) restore_group(group, effects);
    dispatch();
  }
  run(effects);
}

void Dispatcher::restore_group(RestoredGroup& group, Effects& effects) {
  GroupRequest& request = group.accepted.request;
  const int32_t size = request.key.group_size;
  if (std::ranges::count(group.is_done, false) == 0) return;
  if (group.accepted.skipped || group.is_aborted) {
    for (int32_t i = 0; i < size; ++i) {
      if (!group.is_done[static_cast<size_t>(i)]) request.sample_indices.push_back(i);
    }
    group.is_aborted ? commit_empty(request, effects)
                     : fail_open(request, *group.accepted.skipped, effects);
    return;
  }
  if (!group.cut_lengths.empty()) {
    request.response_lengths.assign(static_cast<size_t>(size), request.sampling.response_length);
    for (const auto& [sample, num_tokens] : group.cut_lengths) {
      request.response_lengths[static_cast<size_t>(sample)] = num_tokens;
      cut_samples_.emplace(request.key.request_id, request.key.prompt_index, sample);
    }
  }
  ledger_.accept(std::move(request), std::move(group.accepted.origin),
                 {.is_done = std::move(group.is_done), .must_finish = group.is_formed});
}

// A client that aborts now cannot take back what it was delivered: the batch is to be the same.
bool Dispatcher::goes_on(const bridge::SampleKey& key, bridge::FinishReason reason, int32_t worker,
                         int32_t attempt) {
  if (reason != bridge::FinishReason::kAbort) return false;
  const auto tokens = ledger_.give_back(key, worker, attempt);
  if (!tokens) return false;
  release_tokens(worker, *tokens);
  dispatch();
  return true;
}

// It was aborted where it ends now by length: the same tokens, and so the same sample.
bool Dispatcher::is_cut(const bridge::SampleKey& key) {
  return cut_samples_.erase({key.request_id, key.prompt_index, key.sample_index}) > 0;
}

// Older weights than those awaited are a step on the way to them, unless resume() says otherwise.
bool Dispatcher::is_on_the_way(int64_t version) const {
  return awaited_version_ && version < *awaited_version_;
}

// Before any worker switches: a batch may hold a sample of the new weights before all have, and
// that batch is written down behind this, so that whoever comes to have it again awaits them.
void Dispatcher::log_switch(int64_t version) {
  if (log_ != nullptr && !is_on_the_way(version)) log_->switched(version);
}

void Dispatcher::note_switch() {
  if (is_on_the_way(weights_.version)) return;
  if (!std::exchange(awaited_version_, std::nullopt)) return;
  dispatch();
}

void Dispatcher::forget_log() {
  const std::lock_guard lock(mutex_);
  log_ = nullptr;
}

void Dispatcher::lose_log(ErrorInfo error) {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    end_with(std::move(error), effects);
  }
  changed_.notify_all();
  run(effects);
}

}  // namespace rollpack::rollout
