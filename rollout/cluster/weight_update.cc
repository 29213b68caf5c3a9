// Weights in two phases over all workers: every one stages and checks the whole set, then all
// switch, each between two of its steps. A refusal anywhere discards the set everywhere.
//
// Where ranks of a node share memory, worker 0 packs once and the others adopt its packed set;
// otherwise each packs into memory of its own.
#include <utility>

#include <fmt/format.h>

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

void Dispatcher::begin_weights(bridge::WeightUpdate update, bridge::OutcomeCallback done) {
  bridge::Outcome error;
  {
    const std::lock_guard lock(mutex_);
    if (fatal_) {
      error = fatal_;
    } else if (update_version_) {
      error = wrong_state(fmt::format("begin of version {}", update.version),
                          fmt::format("the end of version {}'s update first", *update_version_));
    } else if (update.version <= weight_version_) {
      error =
          ErrorInfo{.code = ErrorCode::kInvalidArgument,
                    .field = "version",
                    .value = std::to_string(update.version),
                    .allowed = fmt::format("more than the current version {}", weight_version_)};
    } else if (update.base_version && *update.base_version != weight_version_) {
      error = ErrorInfo{.code = ErrorCode::kInvalidArgument,
                        .field = "base_version",
                        .value = std::to_string(*update.base_version),
                        .allowed = fmt::format("{}, the current version", weight_version_)};
    } else {
      update_version_ = update.version;
      broadcast(
          packing_workers(),
          [is_partial = update.base_version.has_value()](uint64_t ticket) {
            return BeginWeights{ticket, is_partial};
          },
          [this, done](bridge::Outcome refused, int) {
            refused ? drop_update(done, std::move(refused)) : done(std::nullopt);
          });
      return;
    }
  }
  done(std::move(error));
}

void Dispatcher::stage_weights(bridge::WeightChunk chunk, bridge::OutcomeCallback done) {
  {
    const std::lock_guard lock(mutex_);
    if (update_version_ && !fatal_) {
      const auto shared = std::make_shared<const bridge::WeightChunk>(std::move(chunk));
      broadcast(
          packing_workers(),
          [&](uint64_t ticket) {
            return StageWeights{ticket, shared};
          },
          [this, done](bridge::Outcome refused, int) {
            refused ? drop_update(done, std::move(refused)) : done(std::nullopt);
          });
      return;
    }
  }
  done(wrong_state("chunk", "begin first"));
}

void Dispatcher::commit_weights(bridge::InFlight in_flight, bridge::OutcomeCallback done) {
  {
    const std::lock_guard lock(mutex_);
    if (update_version_ && !fatal_) {
      broadcast(
          packing_workers(), [](uint64_t ticket) { return FinishWeights{ticket}; },
          [this, in_flight, done](bridge::Outcome refused, int) {
            if (refused) return drop_update(done, std::move(refused));
            shares_weights_ ? share_weights(in_flight, done) : switch_weights(in_flight, done);
          });
      return;
    }
  }
  done(wrong_state("commit", "begin first"));
}

// Worker 0's packed set goes to all others.
void Dispatcher::share_weights(bridge::InFlight in_flight, bridge::OutcomeCallback done) {
  const std::lock_guard lock(mutex_);
  broadcast(
      {0}, [](uint64_t ticket) { return ExportWeights{ticket}; },
      [this, in_flight, done](bridge::Outcome refused, int fd) {
        if (refused) return drop_update(done, std::move(refused));
        const std::lock_guard relock(mutex_);
        std::vector<int32_t> others = all_workers();
        others.erase(others.begin());
        const auto shared = std::make_shared<const bridge::OwnedFd>(bridge::OwnedFd::duplicate(fd));
        broadcast(
            others,
            [&](uint64_t ticket) {
              return AdoptWeights{ticket, shared};
            },
            [this, in_flight, done](bridge::Outcome not_adopted, int) {
              not_adopted ? drop_update(done, std::move(not_adopted))
                          : switch_weights(in_flight, done);
            });
      });
}

void Dispatcher::share_first_weights(bridge::OwnedFd fd) {
  const std::lock_guard lock(mutex_);
  const auto shared = std::make_shared<const bridge::OwnedFd>(std::move(fd));
  const auto fail_start = [this](bridge::Outcome error, int) {
    if (!error) return;
    Effects effects;
    {
      const std::lock_guard relock(mutex_);
      end_with(*error, effects);
    }
    changed_.notify_all();
    run(effects);
  };
  std::vector<int32_t> others = all_workers();
  others.erase(others.begin());
  broadcast(
      others,
      [&](uint64_t ticket) {
        return AdoptWeights{ticket, shared};
      },
      fail_start);
  broadcast(
      others, [](uint64_t ticket) { return CommitWeights{.ticket = ticket}; }, fail_start);
}

void Dispatcher::switch_weights(bridge::InFlight in_flight, bridge::OutcomeCallback done) {
  std::unique_lock lock(mutex_);
  if (!update_version_) {  // cancelled while the ranks checked
    lock.unlock();
    done(wrong_state("commit", "begin first: the update was cancelled"));
    return;
  }
  const int64_t version = *update_version_;
  is_switching_ = true;
  broadcast(
      all_workers(),
      [&](uint64_t ticket) {
        return CommitWeights{ticket, version, in_flight};
      },
      [this, version, done](bridge::Outcome error, int) {
        Effects effects;
        {
          const std::lock_guard relock(mutex_);
          update_version_.reset();
          is_switching_ = false;
          if (error) {
            end_with(*error, effects);  // some switched, some did not: no version to go on with
          } else {
            weight_version_ = version;
          }
        }
        run(effects);
        done(std::move(error));
      });
}

void Dispatcher::cancel_weights() {
  const std::lock_guard lock(mutex_);
  if (!update_version_ || is_switching_) return;  // past the point of no return
  update_version_.reset();
  for (const int32_t worker : all_workers()) workers_[worker].link->send(DiscardWeights{});
}

void Dispatcher::drop_update(const bridge::OutcomeCallback& done, bridge::Outcome error) {
  cancel_weights();
  done(std::move(error));
}

}  // namespace rollpack::rollout
