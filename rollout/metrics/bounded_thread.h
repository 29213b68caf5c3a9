// A thread whose end is waited for only so long: a process that ends is not held up by one that
// does not react. What the thread uses must be its own (shared) then.
#pragma once

#include <chrono>
#include <functional>
#include <future>
#include <thread>
#include <utility>

namespace rollpack::rollout {

class BoundedThread {
 public:
  // Of no lower priority than threads that compute: they wait for locks that it may hold.
  explicit BoundedThread(std::function<void()> body) {
    std::promise<void> ended;
    ended_ = ended.get_future();
    thread_ = std::thread([body = std::move(body), ended = std::move(ended)]() mutable {
      body();
      body = nullptr;  // what it holds ends before its end is told
      ended.set_value();
    });
  }
  ~BoundedThread() {
    if (thread_.joinable()) thread_.detach();
  }
  BoundedThread(const BoundedThread&) = delete;
  BoundedThread& operator=(const BoundedThread&) = delete;

  // To be called once `body` was told to end. False: it has not within `limit`, and is left alone.
  bool join(std::chrono::milliseconds limit) {
    if (ended_.wait_for(limit) != std::future_status::ready) {
      thread_.detach();
      return false;
    }
    thread_.join();
    return true;
  }

 private:
  std::future<void> ended_;
  std::thread thread_;
};

}  // namespace rollpack::rollout
