// Why a command has to end before its work is done: a signal, a shutdown request, a lost rank.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

namespace rollpack::rollout {

// Blocks SIGTERM, SIGINT and SIGHUP in this thread and all it will start; call first in main().
void block_end_signals();

// Waits for the blocked signals on a thread of its own; a second one ends the process at once.
class EndSignal {
 public:
  EndSignal();
  ~EndSignal();

  void raise(int status);  // from any thread; the first status counts
  // Wakes the waiter to look at its own condition again.
  void notify();
  bool is_raised() const;
  int status() const;  // 128 + signal number, or what raise() was given

  // Waits until raised or until `done` holds; returns is_raised().
  template <class Done>
  bool wait(Done done) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return is_raised_ || done(); });
    return is_raised_;
  }

 private:
  void watch();

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool is_raised_ = false;
  int status_ = 0;
  std::thread thread_;
};

}  // namespace rollpack::rollout
