#include "rollout/node_bridge/kept_store.h"

#include <utility>

#include <fmt/format.h>

namespace rollpack::rollout {

void KeptStore::keep(int32_t worker, int32_t attempt, bridge::Sample sample) {
  const std::lock_guard lock(mutex_);
  const Name name = name_of(sample.key, attempt);
  if (auto decided = decided_.extract(name)) {
    return carry_out(decided.mapped().verdict, std::move(sample));
  }
  if (forgotten_.contains(worker)) {
    ++num_dropped_;
    return;
  }
  kept_.insert_or_assign(name, Kept{worker, std::move(sample)});
}

void KeptStore::decide(int32_t worker, const bridge::SampleKey& key, int32_t attempt,
                       Verdict verdict) {
  const std::lock_guard lock(mutex_);
  const Name name = name_of(key, attempt);
  if (auto kept = kept_.extract(name)) {
    return carry_out(verdict, std::move(kept.mapped().sample));
  }
  const Decided decided{worker, key, verdict};
  if (has_ended(worker)) return lose(decided);
  if (verdict == Verdict::kDrop && forgotten_.contains(worker)) return;
  decided_.insert_or_assign(name, decided);
}

void KeptStore::forget(int32_t worker) {
  const std::lock_guard lock(mutex_);
  forgotten_.insert(worker);
  num_dropped_ += static_cast<int64_t>(
      std::erase_if(kept_, [&](const auto& each) { return each.second.worker == worker; }));
}

void KeptStore::begin(int32_t worker) {
  const std::lock_guard lock(mutex_);
  ++num_connections_[worker];
}

bool KeptStore::has_ended(int32_t worker) const {
  const auto found = num_connections_.find(worker);
  return found != num_connections_.end() && found->second == 0;
}

void KeptStore::end(int32_t worker) {
  const std::lock_guard lock(mutex_);
  if (--num_connections_[worker] > 0) return;
  std::erase_if(decided_, [&](const auto& each) {
    if (each.second.worker != worker) return false;
    lose(each.second);
    return true;
  });
}

void KeptStore::carry_out(Verdict verdict, bridge::Sample sample) {
  if (verdict == Verdict::kDrop) {
    ++num_dropped_;
    return;
  }
  if (verdict == Verdict::kCommitAsAborted) bridge::end_as_aborted(sample);
  sink_.commit(std::move(sample));
}

// A worker hands its sample over before it tells rank 0, so this takes a broken machine or program.
void KeptStore::lose(const Decided& decided) {
  if (decided.verdict == Verdict::kDrop) return;
  sink_.fail({decided.key,
              {.code = ErrorCode::kDataLoss,
               .field = "sample",
               .value = fmt::format("request {}, prompt {}, sample {}", decided.key.request_id,
                                    decided.key.prompt_index, decided.key.sample_index),
               .origin = fmt::format("rank {}", decided.worker),
               .message = "the rank said that it was made and has not handed it over"}});
}

int64_t KeptStore::num_samples() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int64_t>(kept_.size());
}

int64_t KeptStore::num_dropped() const {
  const std::lock_guard lock(mutex_);
  return num_dropped_;
}

}  // namespace rollpack::rollout
