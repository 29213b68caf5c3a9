#include "rollout/command/end_signal.h"

#include <signal.h>

#include <cstdlib>

namespace rollpack::rollout {
namespace {

sigset_t end_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&signals, signal);
  return signals;
}

// Wakes the watching thread for good; real-time signals are free for a program's own use.
const int kStopWatching = SIGRTMIN;

}  // namespace

void block_end_signals() {
  sigset_t signals = end_signals();
  sigaddset(&signals, kStopWatching);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  ::signal(SIGPIPE, SIG_IGN);  // a reader that went away is an error of the write
  ::signal(SIGXFSZ, SIG_IGN);  // likewise a file beyond `ulimit -f`
}

EndSignal::EndSignal() : thread_([this] { watch(); }) {}

EndSignal::~EndSignal() {
  pthread_kill(thread_.native_handle(), kStopWatching);
  thread_.join();
}

void EndSignal::watch() {
  sigset_t signals = end_signals();
  sigaddset(&signals, kStopWatching);
  for (;;) {
    int signal = 0;
    if (sigwait(&signals, &signal) != 0 || signal == kStopWatching) return;
    if (is_raised()) std::_Exit(128 + signal);
    raise(128 + signal);
  }
}

void EndSignal::raise(int status) {
  {
    const std::lock_guard lock(mutex_);
    if (is_raised_) return;
    is_raised_ = true;
    status_ = status;
  }
  changed_.notify_all();
}

void EndSignal::notify() {
  { const std::lock_guard lock(mutex_); }  // a waiter between its check and its sleep is not missed
  changed_.notify_all();
}

bool EndSignal::is_raised() const {
  const std::lock_guard lock(mutex_);
  return is_raised_;
}

int EndSignal::status() const {
  const std::lock_guard lock(mutex_);
  return status_;
}

}  // namespace rollpack::rollout
