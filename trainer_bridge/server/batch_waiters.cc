#include "trainer_bridge/server/batch_waiters.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <utility>

namespace rollpack::bridge {
namespace {

// The service says how it is only when asked: this is how late a waiting call may learn of it.
constexpr auto kHealthPeriod = std::chrono::milliseconds(20);

}  // namespace

void BatchWaiters::add(Waiter waiter) {
  waiting_.push_back(std::move(waiter));
  serve();
}

// Callbacks only queue replies, so that none of them comes back in here.
void BatchWaiters::serve() {
  bool is_blocked = false;
  for (auto waiter = waiting_.begin(); waiter != waiting_.end();) {
    auto notice = is_blocked ? delivery_.pending(waiter->client)
                             : delivery_.next_batch(waiter->client, waiter->wish);
    if (!notice) {
      is_blocked = true;
      ++waiter;
      continue;
    }
    const Waiter served = std::move(*waiter);
    waiter = waiting_.erase(waiter);
    waits_.add(std::chrono::steady_clock::now() - served.asked);
    served.deliver(*std::move(notice));
  }
  if (waiting_.empty()) return;
  if (const Outcome sick = health_()) refuse_all(*sick);
  refuse_expired();
  schedule();
}

void BatchWaiters::refuse_expired() {
  const auto now = std::chrono::steady_clock::now();
  const auto first = std::stable_partition(waiting_.begin(), waiting_.end(),
                                           [&](const Waiter& w) { return w.deadline > now; });
  std::vector<Waiter> expired(std::make_move_iterator(first),
                              std::make_move_iterator(waiting_.end()));
  waiting_.erase(first, waiting_.end());
  num_expired_ += static_cast<int64_t>(expired.size());
  for (const Waiter& waiter : expired) waiter.refuse(timed_out(waiter));
}

void BatchWaiters::schedule() {
  if (waiting_.empty()) {
    timer_.cancel();
    return;
  }
  auto next = std::chrono::steady_clock::now() + kHealthPeriod;
  for (const Waiter& waiter : waiting_) next = std::min(next, waiter.deadline);
  timer_.expires_at(next);
  timer_.async_wait([this](SystemError error) {
    if (!error) serve();
  });
}

void BatchWaiters::remove(uint64_t client) {
  std::erase_if(waiting_, [&](const Waiter& waiter) { return waiter.client == client; });
}

void BatchWaiters::refuse_all(const ErrorInfo& error) {
  for (const Waiter& waiter : std::exchange(waiting_, {})) waiter.refuse(error);
}

ErrorInfo BatchWaiters::timed_out(const Waiter& waiter) const {
  double num_finished = 0, num_slots = 0, num_in_use = 0;
  for (const auto& [name, value] : delivery_.stats()) {
    if (name == "num_finished_groups") num_finished = value;
    if (name == "num_slots") num_slots = value;
    if (name == "num_slots_in_use") num_in_use = value;
  }
  const std::string advice = advice_();
  return {.code = ErrorCode::kDeadlineExceeded,
          .field = "next_batch",
          .value = fmt::format("{} finished groups after {} ms", num_finished, waiter.timeout_ms),
          .allowed = fmt::format(
              "{} or more", waiter.wish.min_ready.value_or(waiter.wish.num_groups.value_or(1))),
          .message = !advice.empty() ? advice
                     : num_in_use == num_slots
                         ? fmt::format("all {} slots are held: release batches", num_slots)
                         : "nothing came in time; ask again"};
}

}  // namespace rollpack::bridge
