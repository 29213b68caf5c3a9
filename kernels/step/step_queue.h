// Steps in flight of a backend that computes on the host: one driver thread runs them in order,
// results and errors wait on their handles.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "kernels/backend.h"

namespace rollpack::kernels {

class StepQueue {
 public:
  using Run = std::function<StepResult(const StepPlan& plan, StepProgram& program)>;

  // `run` is called on the driver thread, one step at a time.
  explicit StepQueue(Run run);
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
  // Lets the running step end and drops the rest. Idempotent.
  void close();

 private:
  struct Step {
    StepHandle handle = 0;
    StepPlan plan;
    std::shared_ptr<StepProgram> program;
    StepResult result;
    std::exception_ptr error;
    bool is_done = false;
  };
  using Steps = std::deque<std::unique_ptr<Step>>;

  void drive();
  Step* next_to_run() const;
  Steps::iterator find(StepHandle handle);

  const Run run_;
  std::mutex mutex_;
  std::condition_variable changed_;
  Steps steps_;  // in flight, oldest first; a step's address is stable
  StepHandle last_handle_ = 0;
  bool is_closing_ = false;
  std::thread driver_;
};

}  // namespace rollpack::kernels
