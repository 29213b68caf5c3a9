// What a worker does with new weights: packs or adopts them, has them checked beside its steps, and
// switches between two of them.
#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/fault_point.h"
#include "rollout/cluster/lent_tensor.h"
#include "rollout/cluster/worker.h"

namespace rollpack::rollout {
namespace {

double milliseconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

// How long all waits for an update's next phase together may hold steps up. A step of a full batch
// takes longer than the 30 ms in which a client writes a chunk of 64 MiB, so that waiting for what
// is under way ends an update sooner than another step would; two thirds of the 150 ms of pause
// beyond packing that an update may cost.
constexpr std::chrono::milliseconds kPhaseWait{100};

// Adds the time of its scope to `sum_ms`, where steps wait for it.
class Lap {
 public:
  Lap(double& sum_ms, const Engine& engine)
      : sum_ms_(engine.has_work() && engine.is_awake() ? &sum_ms : nullptr) {}
  ~Lap() {
    if (sum_ms_ != nullptr) *sum_ms_ += milliseconds_since(start_);
  }

 private:
  double* const sum_ms_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

void Worker::handle(BeginWeights& command) {
  finish_check();
  times_ = {};
  phase_wait_ = kPhaseWait;
  is_phase_due_ = true;
  acknowledge(command.ticket, [&] {
    const Lap lap(times_.packing_ms, engine_);
    command.is_partial ? replica_.weights().begin_partial_staging()
                       : replica_.weights().begin_staging();
    fault_at(FaultPoint::kWeightsBegun);
  });
}

void Worker::handle(StageWeights& command) {
  finish_check();
  is_phase_due_ = true;
  acknowledge(command.ticket, [&] {
    const Lap lap(times_.packing_ms, engine_);
    for (const bridge::WeightTensor& tensor : command.chunk->tensors) {
      if (command.chunk->lender) {
        const LentTensor lent(tensor, *command.chunk->lender);
        replica_.weights().stage(tensor.name, tensor.shape, lent);
      } else {
        replica_.weights().stage(tensor.name, tensor.dtype, tensor.shape, tensor.bytes);
      }
    }
    fault_at(FaultPoint::kWeightsStaged);
  });
}

void Worker::handle(FinishWeights& command) {
  finish_check();
  try {
    const Lap lap(times_.packing_ms, engine_);
    replica_.weights().finish_staging();
  } catch (const Error& error) {
    return emit_(Ack{.ticket = command.ticket, .error = error.info});
  }
  if (command.exports) is_phase_due_ = false;  // the others read the set through first
  check_staged(command.ticket, command.exports);
}

void Worker::handle(AdoptWeights& command) {
  try {
    const Lap lap(times_.pause_ms, engine_);
    finish_check();
    replica_.backend().adopt_staged_weights(command.fd->get());
  } catch (const Error& error) {
    return emit_(Ack{.ticket = command.ticket, .error = error.info});
  }
  check_staged(command.ticket, false);
}

// Whether commands have come that should be taken before another step: an update's next phase.
bool Worker::has_next_phase() {
  if (!is_phase_due_ || is_stopped_ || !engine_.has_work() || !engine_.is_awake()) return false;
  const Lap lap(times_.pause_ms, engine_);
  const auto start = std::chrono::steady_clock::now();
  std::unique_lock lock(mutex_);
  const bool has_come = wake_.wait_for(lock, phase_wait_, [&] { return !mailbox_.empty(); });
  phase_wait_ = std::max(std::chrono::nanoseconds{0},
                         phase_wait_ - (std::chrono::steady_clock::now() - start));
  return has_come;
}

void Worker::handle(CommitWeights& command) {
  is_phase_due_ = false;
  if (command.in_flight == bridge::InFlight::kWait && engine_.has_started_work() &&
      !stands_still()) {
    engine_.set_admits(false);
    pending_commit_ = command;
    return;
  }
  if (command.in_flight == bridge::InFlight::kAbort) engine_.abort(std::nullopt);
  switch_weights(command);
}

void Worker::handle(DiscardWeights&) {
  finish_check();
  is_phase_due_ = false;
  replica_.backend().discard_weights();
  times_ = {};
}

// What it acknowledges with: the hash that goes with the set which steps use from now on.
void Worker::switch_weights(const CommitWeights& command) {
  finish_steps();
  Ack ack{.ticket = command.ticket};
  try {
    {
      const Lap lap(times_.pause_ms, engine_);
      finish_check();
      replica_.backend().commit_weights();
      engine_.switch_version(command.version);
    }
    fault_at(FaultPoint::kWeightsSwitched);
    ack.weights_hash = replica_.backend().weights_hash();
    ack.times = last_times_ = std::exchange(times_, {});
    last_prefill_ms_ = 0;
    if (engine_.has_started_work() && engine_.is_awake())
      prefill_since_ = std::chrono::steady_clock::now();
  } catch (const Error& error) {
    ack.error = error.info;
  }
  emit_(std::move(ack));
}

// Keys and values went with the old weights: until those of every live sample are there again.
void Worker::watch_prefill() {
  if (!prefill_since_ || engine_.is_behind()) return;
  last_prefill_ms_ = milliseconds_since(*prefill_since_);
  prefill_since_.reset();
}

// The staged set is read through before anybody switches to it, beside the steps: at 15 GB/s it
// would cost each of them a pause. So would sealing what is exported, 50 ms for 1 GB in pages of
// 4 KiB.
void Worker::check_staged(uint64_t ticket, bool exports) {
  check_ = std::thread([this, ticket, exports] {
    Ack ack{.ticket = ticket};
    try {
      ack.weights_hash = replica_.backend().staged_weights_hash();
      if (exports) ack.fd = replica_.backend().export_staged_weights();
      fault_at(FaultPoint::kWeightsChecked);
    } catch (const Error& error) {
      ack.error = error.info;
    }
    emit_(std::move(ack));
  });
}

void Worker::finish_check() {
  if (check_.joinable()) check_.join();
}

}  // namespace rollpack::rollout
