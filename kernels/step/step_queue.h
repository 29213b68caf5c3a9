// Steps in flight of a backend: one driver thread runs them in order, results and errors wait on
// their handles. A backend that computes on the host runs a step at a time; one with a device hands
// it the next step while it still computes the one before.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "kernels/backend.h"

namespace rollpack::kernels {

class StepQueue {
 public:
  using Run = std::function<StepResult(const StepPlan& plan, StepProgram& program)>;
  // Of a device, which is given steps and looked after. All are called on the driver thread.
  struct DeviceRun {
    // Hands a step over without waiting for it. An error is the step's: it was not handed over.
    std::function<void(const StepPlan& plan, StepProgram& program)> begin;
    // The result of the oldest step handed over and not ended; nothing while the device computes.
    // An error is that step's and its end.
    std::function<std::optional<StepResult>()> end;
  };

  // `run` is called on the driver thread, one step at a time.
  explicit StepQueue(Run run);
  explicit StepQueue(DeviceRun run);
  ~StepQueue() { close(); }
  StepQueue(const StepQueue&) = delete;
  StepQueue& operator=(const StepQueue&) = delete;

  // Never blocks. A step is in flight until wait() took its result or error, so that a caller's
  // third submit fails or succeeds whatever the machine's speed.
  // Errors: failed_precondition for a third step in flight, and where the backend's program is
  // null.
  StepHandle submit(StepPlan plan, std::shared_ptr<StepProgram> program);
  // Whether the step is done. Errors, also of wait: not_found for a handle that was never given out
  // or whose result is taken.
  bool poll(StepHandle handle);
  // Errors: the step's own; deadline_exceeded, the step stays in flight.
  StepResult wait(StepHandle handle, Deadline deadline);
  // Returns when no step runs or waits to run; lets go of the programs of those that have run.
  void drain();
  // Lets the running steps end and drops the rest. Idempotent.
  void close();

 private:
  enum class State : uint8_t { kWaiting, kBegun, kDone };

  struct Step {
    StepHandle handle = 0;
    StepPlan plan;
    std::shared_ptr<StepProgram> program;
    StepResult result;
    std::exception_ptr error;
    State state = State::kWaiting;
  };
  using Steps = std::deque<std::unique_ptr<Step>>;

  void drive();
  void drive_device();
  // The oldest in this state; null: none is.
  Step* first(State state) const;
  bool is_idle() const {
    return first(State::kWaiting) == nullptr && first(State::kBegun) == nullptr;
  }
  Steps::iterator find(StepHandle handle);

  const Run run_;
  const DeviceRun device_;
  std::mutex mutex_;
  std::condition_variable changed_;
  Steps steps_;  // in flight, oldest first; a step's address is stable
  StepHandle last_handle_ = 0;
  bool is_closing_ = false;
  std::thread driver_;
};

}  // namespace rollpack::kernels
