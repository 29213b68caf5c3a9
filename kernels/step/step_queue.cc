#include "kernels/step/step_queue.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/error.h"

namespace rollpack::kernels {
namespace {

constexpr size_t kMaxStepsInFlight = 2;

// A device's step takes milliseconds: its end is looked for again and again at first, then with
// pauses that a step does not feel.
constexpr int kEagerLooks = 100;
constexpr std::chrono::microseconds kLookInterval{20};

}  // namespace

StepQueue::StepQueue(Run run) : run_(std::move(run)), driver_([this] { drive(); }) {}

StepQueue::StepQueue(DeviceRun run)
    : device_(std::move(run)), driver_([this] { drive_device(); }) {}

StepHandle StepQueue::submit(StepPlan plan, std::shared_ptr<StepProgram> program) {
  if (!program) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "submit",
                 .message = "no program is set; call set_program first"});
  }
  auto step = std::make_unique<Step>();
  step->plan = std::move(plan);
  step->program = std::move(program);
  const std::lock_guard lock(mutex_);
  if (steps_.size() == kMaxStepsInFlight) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "steps in flight",
                 .value = std::to_string(steps_.size()),
                 .allowed = "at most " + std::to_string(kMaxStepsInFlight),
                 .message = "wait for the oldest step before submitting another"});
  }
  step->handle = ++last_handle_;
  steps_.push_back(std::move(step));
  changed_.notify_all();
  return last_handle_;
}

bool StepQueue::poll(StepHandle handle) {
  const std::lock_guard lock(mutex_);
  return (*find(handle))->state == State::kDone;
}

StepResult StepQueue::wait(StepHandle handle, Deadline deadline) {
  std::unique_lock lock(mutex_);
  const Step& step = **find(handle);
  if (!changed_.wait_until(lock, deadline, [&] { return step.state == State::kDone; })) {
    throw Error({.code = ErrorCode::kDeadlineExceeded,
                 .field = "step",
                 .value = std::to_string(handle),
                 .message = "the step is still running"});
  }
  const auto at = find(handle);
  const std::unique_ptr<Step> taken = std::move(*at);
  steps_.erase(at);
  lock.unlock();
  if (taken->error) std::rethrow_exception(taken->error);
  return std::move(taken->result);
}

void StepQueue::drain() {
  // Let go of after the lock: what ends with a program may call this queue.
  std::vector<std::shared_ptr<StepProgram>> programs;
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return is_idle(); });
  for (const std::unique_ptr<Step>& step : steps_) programs.push_back(std::move(step->program));
}

void StepQueue::close() {
  {
    const std::lock_guard lock(mutex_);
    is_closing_ = true;
  }
  changed_.notify_all();
  if (driver_.joinable()) driver_.join();
  Steps dropped;  // ends when the queue is empty, for the same reason
  const std::lock_guard lock(mutex_);
  dropped.swap(steps_);
}

void StepQueue::drive() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return is_closing_ || first(State::kWaiting) != nullptr; });
    if (is_closing_) return;
    Step& step = *first(State::kWaiting);  // only done steps leave the queue
    step.state = State::kBegun;
    lock.unlock();
    try {
      step.result = run_(step.plan, *step.program);
    } catch (...) {
      step.error = std::current_exception();
    }
    lock.lock();
    step.state = State::kDone;
    changed_.notify_all();
  }
}

void StepQueue::drive_device() {
  std::unique_lock lock(mutex_);
  int num_looks = 0;  // at the oldest step begun, in vain
  for (;;) {
    Step* const next = is_closing_ ? nullptr : first(State::kWaiting);
    Step* const begun = first(State::kBegun);
    if (next == nullptr && begun == nullptr) {
      if (is_closing_) return;
      changed_.wait(lock);
      continue;
    }
    Step& step = next != nullptr ? *next : *begun;
    bool has_ended = false;
    lock.unlock();
    try {
      if (next != nullptr) {
        device_.begin(step.plan, *step.program);
      } else if (std::optional<StepResult> result = device_.end()) {
        step.result = std::move(*result);
        has_ended = true;
      }
    } catch (...) {
      step.error = std::current_exception();
      has_ended = true;
    }
    lock.lock();
    if (has_ended) {
      step.state = State::kDone;
      num_looks = 0;
      changed_.notify_all();
    } else if (next != nullptr) {
      step.state = State::kBegun;
    } else if (++num_looks > kEagerLooks) {
      // A new step ends the pause.
      changed_.wait_for(lock, kLookInterval, [this] { return first(State::kWaiting) != nullptr; });
    }
  }
}

StepQueue::Step* StepQueue::first(State state) const {
  for (const std::unique_ptr<Step>& step : steps_) {
    if (step->state == state) return step.get();
  }
  return nullptr;
}

StepQueue::Steps::iterator StepQueue::find(StepHandle handle) {
  const auto at = std::find_if(steps_.begin(), steps_.end(),
                               [handle](const auto& step) { return step->handle == handle; });
  if (at == steps_.end()) {
    throw Error({.code = ErrorCode::kNotFound,
                 .field = "step",
                 .value = std::to_string(handle),
                 .message = "no step in flight has this handle"});
  }
  return at;
}

}  // namespace rollpack::kernels
