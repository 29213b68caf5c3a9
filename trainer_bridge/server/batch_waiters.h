// next_batch calls that wait, served in the order they were asked. A call for many groups is not
// overtaken by later calls for few, so that it cannot starve; only what is there for a later client
// alone (its rank's share of a step, what was left behind) goes to it past those that wait.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>

#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/delivery/delivery.h"
#include "trainer_bridge/server/wait_histogram.h"
#include "trainer_bridge/wire/asio.h"

namespace rollpack::bridge {

// Single-threaded: the server's thread.
class BatchWaiters {
 public:
  struct Waiter {
    uint64_t client = 0;
    BatchWish wish;
    int64_t timeout_ms = 0;  // 0 looks once
    std::chrono::steady_clock::time_point deadline;
    std::chrono::steady_clock::time_point asked = std::chrono::steady_clock::now();
    std::function<void(BatchNotice)> deliver;
    std::function<void(const ErrorInfo&)> refuse;
  };

  // `health` says why no more samples will come, if so; it is asked whenever a call has to wait.
  // `advice` says what a call that nothing came for is to do; empty: nothing but ask again.
  BatchWaiters(asio::io_context& io, Delivery& delivery, std::function<Outcome()> health,
               std::function<std::string()> advice)
      : delivery_(delivery), health_(std::move(health)), advice_(std::move(advice)), timer_(io) {}

  void add(Waiter waiter);
  // Serves whom it can. To be called when samples came or slots were given back.
  void serve();
  void remove(uint64_t client);
  void refuse_all(const ErrorInfo& error);
  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t num_expired() const { return num_expired_; }
  // Of the calls that got a batch.
  const WaitHistogram& waits() const { return waits_; }

 private:
  ErrorInfo timed_out(const Waiter& waiter) const;
  void refuse_expired();
  void schedule();

  Delivery& delivery_;
  std::function<Outcome()> health_;
  std::function<std::string()> advice_;
  asio::steady_timer timer_;
  std::deque<Waiter> waiting_;
  WaitHistogram waits_;
  int64_t num_expired_ = 0;
};

}  // namespace rollpack::bridge
