#include "kernels/reference/step_queue.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::kernels::reference {
namespace {

constexpr size_t kMaxStepsInFlight = 2;

}  // namespace

StepQueue::StepQueue(Run run) : run_(std::move(run)), thread_([this] { work(); }) {}

void StepQueue::close() {
  {
    const std::lock_guard lock(mutex_);
    is_closing_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
  steps_.clear();
}

StepHandle StepQueue::submit(StepPlan plan, std::shared_ptr<StepProgram> program) {
  const std::lock_guard lock(mutex_);
  if (steps_.size() == kMaxStepsInFlight) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "steps in flight",
                 .value = fmt::to_string(steps_.size()),
                 .allowed = fmt::format("at most {}", kMaxStepsInFlight),
                 .message = "wait for the oldest step before submitting another"});
  }
  auto step = std::make_unique<Step>();
  step->handle = ++last_handle_;
  step->plan = std::move(plan);
  step->program = std::move(program);
  steps_.push_back(std::move(step));
  changed_.notify_all();
  return last_handle_;
}

bool StepQueue::poll(StepHandle handle) {
  const std::lock_guard lock(mutex_);
  return find(handle).is_done;
}

StepResult StepQueue::wait(StepHandle handle, Deadline deadline) {
  std::unique_lock lock(mutex_);
  Step& step = find(handle);
  if (!changed_.wait_until(lock, deadline, [&] { return step.is_done; })) {
    throw Error({.code = ErrorCode::kDeadlineExceeded,
                 .field = "step",
                 .value = fmt::to_string(handle),
                 .message = "the step is still running"});
  }
  const auto at = std::find_if(steps_.begin(), steps_.end(),
                               [&](const auto& s) { return s->handle == handle; });
  const std::unique_ptr<Step> taken = std::move(*at);
  steps_.erase(at);
  if (taken->error) std::rethrow_exception(taken->error);
  return std::move(taken->result);
}

void StepQueue::drain() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return next_to_run() == nullptr; });
}

StepQueue::Step* StepQueue::next_to_run() {
  for (const auto& step : steps_) {
    if (!step->is_done) return step.get();
  }
  return nullptr;
}

StepQueue::Step& StepQueue::find(StepHandle handle) {
  for (const auto& step : steps_) {
    if (step->handle == handle) return *step;
  }
  throw Error({.code = ErrorCode::kNotFound,
               .field = "step",
               .value = fmt::to_string(handle),
               .message = "no step in flight has this handle"});
}

void StepQueue::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return is_closing_ || next_to_run() != nullptr; });
    if (is_closing_) return;
    Step& step = *next_to_run();  // stays put: only a done step leaves the queue
    lock.unlock();
    try {
      step.result = run_(step.plan, *step.program);
    } catch (...) {
      step.error = std::current_exception();
    }
    lock.lock();
    step.is_done = true;
    changed_.notify_all();
  }
}

}  // namespace rollpack::kernels::reference
