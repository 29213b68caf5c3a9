// The dispatcher's part in sleep and wake-up: all ranks give their memory back, or take it again,
// one call after the other. Nothing is handed out meanwhile, no rank is expected to show progress,
// and none is started in the place of one that is lost.
//
// At level 1 the weights count as asleep wherever they are kept: a trainer that wakes them before
// it updates them does right on every backend.
#include <algorithm>
#include <utility>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "kernels/base/error.h"
#include "rollout/cluster/dispatcher.h"

namespace rollpack::rollout {
namespace {

// Each waits for those before it, and a trainer for each of its own.
constexpr size_t kMaxSleepCalls = 64;

double mebibytes(int64_t bytes) {
  return static_cast<double>(bytes) / (1 << 20);
}

}  // namespace

void Dispatcher::sleep(int level, bridge::InFlight in_flight,
                       bridge::Answer<bridge::SleepState> done) {
  if (level != 1 && level != 2) {
    return done(ErrorInfo{.code = ErrorCode::kInvalidArgument,
                          .field = "level",
                          .value = std::to_string(level),
                          .allowed = "1 or 2"},
                {});
  }
  add_sleep_call({.level = level, .in_flight = in_flight, .tags = {}, .done = std::move(done)});
}

void Dispatcher::wake_up(bridge::MemoryTags tags, bridge::Answer<bridge::SleepState> done) {
  add_sleep_call({.tags = tags, .done = std::move(done)});
}

bridge::SleepState Dispatcher::sleep_state() const {
  const std::lock_guard lock(mutex_);
  return current_sleep();
}

bridge::SleepState Dispatcher::current_sleep() const {
  bridge::SleepState state{.asleep = asleep_, .needs_weights = needs_weights_};
  for (const WorkerState& worker : workers_) {
    const auto held = worker.stats->find("held_bytes");
    if (held != worker.stats->end()) state.held_bytes += static_cast<int64_t>(held->second);
  }
  return state;
}

void Dispatcher::add_sleep_call(SleepCall call) {
  Effects effects;
  bridge::Outcome error;
  {
    const std::lock_guard lock(mutex_);
    if (fatal_) {
      error = fatal_;
    } else if (sleep_calls_.size() >= kMaxSleepCalls) {
      error = ErrorInfo{.code = ErrorCode::kWouldBlock,
                        .field = "calls of sleep and wake_up that wait",
                        .value = std::to_string(sleep_calls_.size()),
                        .allowed = fmt::format("fewer than {}", kMaxSleepCalls)};
    } else {
      sleep_calls_.push_back(std::move(call));
      if (sleep_calls_.size() == 1) begin_sleep_call(effects);
    }
  }
  run(effects);
  if (error) call.done(std::move(error), {});
}

void Dispatcher::begin_sleep_call(Effects& effects) {
  const SleepCall& call = sleep_calls_.front();
  const bool sleeps = call.level > 0;
  if (fatal_) {
    effects.push_back([this, error = *fatal_] { end_sleep_call(error); });
    return;
  }
  if (sleeps && update_version_) {
    ErrorInfo error{.code = ErrorCode::kFailedPrecondition,
                    .field = "sleep",
                    .value = fmt::format("while weights of version {} come", *update_version_),
                    .allowed = "the end of their update first"};
    effects.push_back([this, error = std::move(error)] { end_sleep_call(error); });
    return;
  }
  if (sleeps && (all_workers().empty() || (call.level > 1 && !can_take_weights()))) {
    ErrorInfo error{.code = ErrorCode::kUnavailable,
                    .field = "sleep",
                    .message = all_workers().empty()
                                   ? "no worker takes part at present"
                                   : "rank 0's engine is lost, and no other packs new weights"};
    effects.push_back([this, error = std::move(error)] { end_sleep_call(error); });
    return;
  }
  if (sleeps) {
    asleep_ = {.weights = true, .kv_cache = true};
    if (call.level > 1) {
      needs_weights_ = true;
      kept_weights_.forget();
    }
    tell_change(effects);
  }
  const auto make = [&](uint64_t ticket) -> Command {
    if (sleeps) return Sleep{ticket, call.level, call.in_flight};
    return WakeUp{ticket, call.tags};
  };
  broadcast(
      all_workers(), make, [this](bridge::Outcome error, int) { end_sleep_call(std::move(error)); },
      effects)
      ->sleeps = sleeps;
}

void Dispatcher::end_sleep_call(bridge::Outcome error) {
  Effects effects;
  SleepCall call;
  bridge::SleepState state;
  {
    const std::lock_guard lock(mutex_);
    call = std::move(sleep_calls_.front());
    sleep_calls_.pop_front();
    const bool was_awake = is_awake();
    // Where all who slept are lost nobody sleeps: those who have come in their place, or will, are
    // awake.
    const bool nobody_sleeps = std::ranges::none_of(
        all_workers(), [this](int32_t worker) { return workers_[worker].is_asleep; });
    if (call.level == 0 && nobody_sleeps && !fatal_) error.reset();
    if (call.level == 0 && !error) {
      asleep_.weights &= !call.tags.weights;
      asleep_.kv_cache &= !call.tags.kv_cache;
      if (is_awake() && !was_awake) go_on_awake(effects);
      tell_change(effects);
    }
    state = current_sleep();
    if (!error) {
      spdlog::info("{}; {:.0f} MiB are held by {} ranks",
                   call.level > 0     ? fmt::format("asleep at level {}", call.level)
                   : state.is_awake() ? "awake"
                                      : "awake in part",
                   mebibytes(state.held_bytes), all_workers().size());
    }
    if (call.level == 0 && asleep_.any()) {  // who has joined while others woke up
      for (const int32_t worker : all_workers()) {
        if (!workers_[worker].is_asleep) put_to_sleep(worker);
      }
    }
    if (!sleep_calls_.empty()) begin_sleep_call(effects);
  }
  changed_.notify_all();
  run(effects);
  call.done(std::move(error), state);
}

// Leases begin anew, and what has waited is handed out.
void Dispatcher::go_on_awake(Effects& effects) {
  for (WorkerState& worker : workers_) {
    if (std::exchange(worker.is_asleep, false)) worker.last_progress = recovery_.now();
  }
  start_unreplaced(effects);
  dispatch();
}

// Who has joined meanwhile, unless a call that wakes all is under way: it is awake.
void Dispatcher::put_to_sleep(int32_t worker) {
  const bool wakes = !sleep_calls_.empty() && sleep_calls_.front().level == 0;
  if (!asleep_.any() || wakes) return;
  auto collection = std::make_shared<Collection>();
  collection->sleeps = true;
  collection->done = [](bridge::Outcome, int) {};
  ask(worker, collection, [](uint64_t ticket) { return Sleep{ticket}; });
  const bridge::MemoryTags awake{.weights = !asleep_.weights, .kv_cache = !asleep_.kv_cache};
  if (!awake.any()) return;
  auto waking = std::make_shared<Collection>();
  waking->done = [](bridge::Outcome, int) {};
  ask(worker, waking, [&](uint64_t ticket) { return WakeUp{ticket, awake}; });
}

}  // namespace rollpack::rollout
