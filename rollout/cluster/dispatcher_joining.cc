// The dispatcher's replacements: when one is started in a lost worker's place, and how it catches
// up with the current weights before it takes part.
#include <string>
#include <utility>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "kernels/base/error.h"
#include "rollout/cluster/dispatcher.h"

namespace rollpack::rollout {
namespace {

std::string too_many_partial_updates() {
  return fmt::format("the current weights came in more partial updates than are kept ({})",
                     KeptWeights::kMaxPartialUpdates);
}

}  // namespace

int32_t Dispatcher::add_replacement(std::shared_ptr<WorkerLink> link) {
  const std::lock_guard lock(mutex_);
  --num_starting_;
  ++num_replacements_;
  workers_.push_back({.link = std::move(link),
                      .is_replacement = true,
                      .is_joining = true,
                      .last_progress = recovery_.now()});
  return static_cast<int32_t>(workers_.size()) - 1;
}

void Dispatcher::replacement_failed(ErrorInfo error) {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    --num_starting_;
    spdlog::error("{}", format_error(error));
    end_if_nobody_is_left(error, effects);
  }
  changed_.notify_all();
  run(effects);
}

// Not for a rank that was lost while the job started: what ails it would ail another. Nor for one
// of another node: what starts here would take the CPUs of the ranks here.
void Dispatcher::replace(const WorkerState& lost, Effects& effects) {
  if (!replace_ || is_ending_ || lost.link->node() != 0 || (!lost.is_ready && !lost.is_replacement))
    return;
  if (!is_awake()) {
    unreplaced_.push_back(lost.link->rank_on_node());
    spdlog::info("its replacement is started when the job is awake");
    return;
  }
  if (!kept_weights_.is_complete()) {
    unreplaced_.push_back(lost.link->rank_on_node());
    spdlog::error("no replacement is started until a full update: {}", too_many_partial_updates());
    return;
  }
  if (lost.is_replacement && !lost.has_committed && ++num_fruitless_ >= kMaxFruitless) {
    spdlog::error("{} replacements in a row were lost without a sample: no more are started",
                  num_fruitless_);
    return;
  }
  if (num_fruitless_ >= kMaxFruitless) return;
  start_replacement(lost.link->rank_on_node(), effects);
}

void Dispatcher::start_replacement(int rank_on_node, Effects& effects) {
  ++num_starting_;
  effects.push_back([replace = replace_, rank_on_node] { replace(rank_on_node); });
}

// After an update or a sleep: those that waited for its end.
void Dispatcher::start_unreplaced(Effects& effects) {
  if (is_ending_ || !is_awake() || num_fruitless_ >= kMaxFruitless || !kept_weights_.is_complete())
    return;
  for (const int rank_on_node : std::exchange(unreplaced_, {})) {
    start_replacement(rank_on_node, effects);
  }
}

// While an update is under way nobody can say which weights will be the current ones; where they
// were dropped there are none.
void Dispatcher::begin_join(int32_t worker, Effects& effects) {
  WorkerState& state = workers_[worker];
  state.waits_to_join = update_version_.has_value() || needs_weights_;
  if (state.waits_to_join) return;
  if (!kept_weights_.is_complete()) {  // what came while it loaded was too much
    return give_up(worker,
                   {.code = ErrorCode::kFailedPrecondition,
                    .field = fmt::format("rank {} weights", worker),
                    .value = fmt::format("version {}", state.joined_version),
                    .allowed = fmt::format("version {}, the current one", weights_.version),
                    .message = fmt::format("it cannot catch up: {}", too_many_partial_updates())},
                   effects);
  }
  auto collection = std::make_shared<Collection>();
  collection->must_succeed = true;
  const int64_t version = weights_.version;
  collection->done = [this, worker, version](bridge::Outcome, int) { end_join(worker, version); };
  send_weights(worker, collection);
  if (collection->num_missing == 0) finish(collection, effects);
}

void Dispatcher::send_weights(int32_t worker, const std::shared_ptr<Collection>& collection) {
  if (shares_weights_) {
    ask(worker, collection, [&](uint64_t ticket) {
      return AdoptWeights{ticket, kept_weights_.packed()};
    });
    ask(worker, collection, [&](uint64_t ticket) {
      return CommitWeights{ticket, weights_.version, bridge::InFlight::kKeep};
    });
    return;
  }
  // The checkpoint it has loaded, and all updates since.
  for (const KeptWeights::Update& update : kept_weights_.updates()) {
    if (update.version <= workers_[worker].joined_version) continue;
    ask(worker, collection, [&](uint64_t ticket) {
      return BeginWeights{ticket, update.is_partial};
    });
    for (const auto& chunk : update.chunks) {
      ask(worker, collection, [&](uint64_t ticket) { return StageWeights{ticket, chunk}; });
    }
    ask(worker, collection, [](uint64_t ticket) { return FinishWeights{ticket}; });
    ask(worker, collection, [&](uint64_t ticket) {
      return CommitWeights{ticket, update.version, bridge::InFlight::kKeep};
    });
  }
}

void Dispatcher::end_join(int32_t worker, int64_t version) {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    WorkerState& state = workers_[worker];
    if (state.is_stopped) return;
    state.joined_version = version;
    if (version != weights_.version || update_version_ || needs_weights_) {
      begin_join(worker, effects);
    } else if (state.weights_hash != weights_.hash) {
      give_up(worker, other_weights_error(worker, weights_), effects);
    } else {
      state.is_joining = false;
      spdlog::info("rank {} has joined under weight version {}: {} workers", worker, version,
                   all_workers().size());
      if (is_paused_) {
        auto pause = std::make_shared<Collection>();
        pause->pauses = true;
        pause->done = [](bridge::Outcome, int) {};
        ask(worker, pause, [](uint64_t ticket) { return Pause{ticket}; });
      }
      put_to_sleep(worker);
      if (asks(worker)) askers_.emplace(state.num_outstanding, worker);
      dispatch();
    }
  }
  changed_.notify_all();
  run(effects);
}

// An update has ended, one way or the other.
void Dispatcher::resume_joins(Effects& effects) {
  for (size_t i = 0; i < workers_.size(); ++i) {
    if (workers_[i].waits_to_join && !workers_[i].is_stopped) {
      begin_join(static_cast<int32_t>(i), effects);
    }
  }
}

}  // namespace rollpack::rollout
