// Weights in two phases over all workers: every one stages and checks the whole set, then all
// switch, each between two of its steps. A refusal anywhere discards the set everywhere. Before the
// switch every worker tells the hash of what it has packed, after it the hash of what it uses: who
// differs is given up.
//
// Where ranks of a node share memory, worker 0 packs once and the others adopt its packed set;
// otherwise each packs into memory of its own.
#include <algorithm>
#include <utility>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "kernels/base/error.h"
#include "rollout/cluster/dispatcher.h"

namespace rollpack::rollout {
namespace {

ErrorInfo wrong_state(std::string value, std::string allowed) {
  return {.code = ErrorCode::kFailedPrecondition,
          .field = "update_weights",
          .value = std::move(value),
          .allowed = std::move(allowed)};
}

}  // namespace

std::vector<int32_t> Dispatcher::packing_workers() const {
  return shares_weights_ ? std::vector<int32_t>{0} : all_workers();
}

// One worker packs, which is this process's, and what it packs is all that others will need.
bool Dispatcher::takes_lent_weights() const {
  const std::lock_guard lock(mutex_);
  return shares_weights_ || workers_.size() == 1;
}

bool Dispatcher::can_take_weights() const {
  return std::ranges::any_of(packing_workers(),
                             [this](int32_t worker) { return workers_[worker].takes_part(); });
}

void Dispatcher::begin_weights(bridge::WeightUpdate update, bridge::OutcomeCallback done) {
  Effects effects;
  bridge::Outcome error;
  {
    const std::lock_guard lock(mutex_);
    if (fatal_) {
      error = fatal_;
    } else if (update_version_) {
      error = wrong_state(fmt::format("begin of version {}", update.version),
                          fmt::format("the end of version {}'s update first", *update_version_));
    } else if (asleep_.weights) {
      error =
          wrong_state(fmt::format("begin of version {} while the weights sleep", update.version),
                      "wake_up(tags=[\"weights\"]) first");
    } else if (needs_weights_ && update.base_version) {
      error = ErrorInfo{.code = ErrorCode::kFailedPrecondition,
                        .field = "base_version",
                        .value = std::to_string(*update.base_version),
                        .allowed = "none after sleep(level=2)",
                        .message = "the weights were dropped: send all tensors"};
    } else if (update.version <= weights_.version) {
      error =
          ErrorInfo{.code = ErrorCode::kInvalidArgument,
                    .field = "version",
                    .value = std::to_string(update.version),
                    .allowed = fmt::format("more than the current version {}", weights_.version)};
    } else if (update.base_version && *update.base_version != weights_.version) {
      error = ErrorInfo{.code = ErrorCode::kInvalidArgument,
                        .field = "base_version",
                        .value = std::to_string(*update.base_version),
                        .allowed = fmt::format("{}, the current version", weights_.version)};
    } else {
      update_version_ = update.version;
      update_times_ = {};
      for (WorkerState& worker : workers_) {
        if (worker.takes_part()) worker.weights_hash.reset();
      }
      // A packed set is whole, whatever update made it.
      kept_weights_.begin(update.version, update.base_version.has_value() && !shares_weights_);
      broadcast(
          packing_workers(),
          [is_partial = update.base_version.has_value()](uint64_t ticket) {
            return BeginWeights{ticket, is_partial};
          },
          [this, done](bridge::Outcome refused, int) {
            refused ? drop_update(done, std::move(refused)) : done(std::nullopt);
          },
          effects);
    }
  }
  run(effects);
  if (error) done(std::move(error));
}

void Dispatcher::stage_weights(bridge::WeightChunk chunk, bridge::OutcomeCallback done) {
  Effects effects;
  bool is_begun = false;
  {
    const std::lock_guard lock(mutex_);
    is_begun = update_version_ && !fatal_;
    if (is_begun) {
      const auto shared = std::make_shared<const bridge::WeightChunk>(std::move(chunk));
      if (replace_ && !shares_weights_) kept_weights_.stage(*shared);
      broadcast(
          packing_workers(),
          [&](uint64_t ticket) {
            return StageWeights{ticket, shared};
          },
          [this, done](bridge::Outcome refused, int) {
            refused ? drop_update(done, std::move(refused)) : done(std::nullopt);
          },
          effects);
    }
  }
  run(effects);
  if (!is_begun) done(wrong_state("chunk", "begin first"));
}

void Dispatcher::commit_weights(bridge::InFlight in_flight, bridge::OutcomeCallback done) {
  Effects effects;
  bool is_begun = false;
  {
    const std::lock_guard lock(mutex_);
    is_begun = update_version_ && !fatal_;
    if (is_begun) {
      broadcast(
          packing_workers(),
          [this](uint64_t ticket) {
            return FinishWeights{ticket, shares_weights_};
          },
          [this, in_flight, done](bridge::Outcome refused, int fd) {
            if (refused) return drop_update(done, std::move(refused));
            if (!shares_weights_) return switch_weights(in_flight, done);
            try {
              adopt_weights(bridge::OwnedFd::duplicate(fd), in_flight, done);
            } catch (const Error& error) {  // no descriptor left
              drop_update(done, error.info);
            }
          },
          effects);
    }
  }
  run(effects);
  if (!is_begun) done(wrong_state("commit", "begin first"));
}

// Worker 0's packed set goes to all others.
void Dispatcher::adopt_weights(bridge::OwnedFd fd, bridge::InFlight in_flight,
                               const bridge::OutcomeCallback& done) {
  Effects effects;
  bool has_others = false;
  {
    const std::lock_guard lock(mutex_);
    const std::vector<int32_t> others = workers_beside_first();
    has_others = !others.empty();
    const auto shared = std::make_shared<const bridge::OwnedFd>(std::move(fd));
    if (replace_) kept_weights_.set_packed(shared);
    if (has_others) {
      broadcast(
          others,
          [&](uint64_t ticket) {
            return AdoptWeights{ticket, shared};
          },
          [this, in_flight, done](bridge::Outcome refused, int) {
            refused ? drop_update(done, std::move(refused)) : switch_weights(in_flight, done);
          },
          effects);
    }
  }
  run(effects);
  if (!has_others) switch_weights(in_flight, done);
}

std::vector<int32_t> Dispatcher::workers_beside_first() const {
  std::vector<int32_t> others = all_workers();
  std::erase(others, 0);
  return others;
}

void Dispatcher::share_first_weights(bridge::OwnedFd fd) {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    const auto shared = std::make_shared<const bridge::OwnedFd>(std::move(fd));
    const std::vector<int32_t> others = workers_beside_first();
    const auto fail_start = [this, others](bridge::Outcome error, int) {
      if (!error) return;
      Effects end;
      {
        const std::lock_guard relock(mutex_);
        // Where those that were asked are lost, replacements may be there already.
        const bool is_one_left = std::ranges::any_of(
            others, [this](int32_t worker) { return workers_[worker].takes_part(); });
        if (is_one_left || !recovery_.is_on) end_with(*error, end);
      }
      changed_.notify_all();
      run(end);
    };
    if (replace_) {
      kept_weights_.set_packed(shared);
      kept_weights_.commit();
    }
    if (others.empty()) return;  // lost already
    broadcast(
        others,
        [&](uint64_t ticket) {
          return AdoptWeights{ticket, shared};
        },
        fail_start, effects);
    broadcast(
        others, [](uint64_t ticket) { return CommitWeights{.ticket = ticket}; }, fail_start,
        effects)
        ->weights_hash = weights_.hash;
  }
  run(effects);
}

void Dispatcher::switch_weights(bridge::InFlight in_flight, bridge::OutcomeCallback done) {
  Effects effects;
  bridge::Outcome error;
  {
    const std::lock_guard lock(mutex_);
    if (!update_version_) {  // while the ranks checked
      error = wrong_state("commit", "begin first: the update was cancelled");
    } else {
      const int64_t version = *update_version_;
      const bridge::WeightsInUse next{.version = version,
                                      .hash = agree_on_weights(version, effects)};
      error = fatal_;
      if (!error) {
        is_switching_ = true;
        log_switch(version);
        // Past the point of no return: who cannot switch is given up, so that all others agree.
        const auto collection = broadcast(
            all_workers(),
            [&](uint64_t ticket) {
              return CommitWeights{ticket, version, in_flight};
            },
            [this, next, done](bridge::Outcome refused, int) {
              end_switch(next, std::move(refused), done);
            },
            effects);
        collection->must_succeed = true;
        collection->weights_hash = next.hash;
      }
    }
  }
  changed_.notify_all();
  run(effects);
  if (error) done(std::move(error));
}

// What most of them have packed; of two that are as many, the one of the lower rank. Who has
// something else is given up.
uint64_t Dispatcher::agree_on_weights(int64_t version, Effects& effects) {
  const std::vector<int32_t> workers = all_workers();
  std::map<std::optional<uint64_t>, int> votes;
  for (const int32_t worker : workers) ++votes[workers_[worker].weights_hash];
  std::optional<uint64_t> agreed;
  int most = 0;
  for (const int32_t worker : workers) {
    const std::optional<uint64_t> hash = workers_[worker].weights_hash;
    if (!hash || votes[hash] <= most) continue;
    agreed = hash;
    most = votes[hash];
  }
  const bridge::WeightsInUse expected{.version = version, .hash = agreed.value_or(0)};
  for (const int32_t worker : workers) {
    if (agreed && workers_[worker].weights_hash == agreed) continue;
    give_up(worker, other_weights_error(worker, expected), effects);
  }
  return expected.hash;
}

ErrorInfo Dispatcher::other_weights_error(int32_t worker,
                                          const bridge::WeightsInUse& expected) const {
  const std::optional<uint64_t> told = workers_[worker].weights_hash;
  return {.code = ErrorCode::kDataLoss,
          .field = fmt::format("rank {} weights", worker),
          .value = told ? fmt::format("hash {:016x}", *told) : "without a hash",
          .allowed = fmt::format("hash {:016x}, which the other ranks have for version {}",
                                 expected.hash, expected.version),
          .message = "what it has packed is not what it was sent; it may not draw samples"};
}

void Dispatcher::end_switch(const bridge::WeightsInUse& switched, bridge::Outcome error,
                            const bridge::OutcomeCallback& done) {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    update_version_.reset();
    is_switching_ = false;
    if (error) {
      kept_weights_.discard();
      // Some switched, some did not: no version to go on with. With recovery who did not is given
      // up, so an error says that nobody did.
      recovery_.is_on ? end_if_nobody_is_left(*error, effects) : end_with(*error, effects);
    } else {
      weights_ = switched;
      weights_.packing_ms = update_times_.packing_ms;
      weights_.pause_ms = update_times_.pause_ms;
      ++num_weight_updates_;
      spdlog::info("weight version {} is current: {} workers", switched.version,
                   all_workers().size());
      kept_weights_.commit();
      note_switch();
      if (std::exchange(needs_weights_, false) && is_awake()) go_on_awake(effects);
      tell_change(effects);
    }
    start_unreplaced(effects);
    resume_joins(effects);
  }
  changed_.notify_all();
  run(effects);
  done(std::move(error));
}

void Dispatcher::cancel_weights() {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    if (!update_version_ || is_switching_) return;  // past the point of no return
    update_version_.reset();
    kept_weights_.discard();
    for (const int32_t worker : all_workers()) workers_[worker].link->send(DiscardWeights{});
    resume_joins(effects);
  }
  run(effects);
}

void Dispatcher::drop_update(const bridge::OutcomeCallback& done, bridge::Outcome error) {
  cancel_weights();
  done(std::move(error));
}

}  // namespace rollpack::rollout
