// Steps in flight: one thread runs them in order, results and errors wait on their handles.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "kernels/backend.h"

namespace rollpack::kernels::reference {

class StepQueue {
 public:
  using Run = std::function<StepResult(const StepPlan&, StepProgram&)>;

  explicit StepQueue(Run run);
  ~StepQueue() { close(); }
  StepQueue(const StepQueue&) = delete;
  StepQueue& operator=(const StepQueue&) = delete;

  // A step is in flight until wait() took its result. Errors: failed_precondition for a third one.
  StepHandle submit(StepPlan plan, std::shared_ptr<StepProgram> program);
  // Errors (both): not_found for a handle that was never given out or whose result is taken.
  bool poll(StepHandle handle);
  StepResult wait(StepHandle handle, Deadline deadline);
  // Returns when nothing is queued or running.
  void drain();
  // Lets the running step end, drops the steps behind it and every result not taken.
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

  void work();
  Step* next_to_run();
  Step& find(StepHandle handle);

  Run run_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::unique_ptr<Step>> steps_;  // in flight, oldest first
  StepHandle last_handle_ = 0;
  bool is_closing_ = false;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace rollpack::kernels::reference
