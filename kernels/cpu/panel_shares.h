// How threads share the panels of a product: each takes consecutive ones, so that a thread reads
// one stream of memory and knows what it will read next, and helps the others when its own are
// done.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

#include "kernels/cpu/thread_pool.h"

namespace rollpack::kernels::cpu {

class PanelShares {
 public:
  PanelShares(int64_t num_items, int num_threads)
      : num_shares_(std::clamp<int64_t>(num_threads, 1, std::min(kMaxShares, num_items))) {
    for (int64_t s = 0; s < num_shares_; ++s) {
      shares_[s].next.store(num_items * s / num_shares_, std::memory_order_relaxed);
      shares_[s].end = num_items * (s + 1) / num_shares_;
    }
  }

  // Calls task(item, next, thread) once for every item; `next` is the item that this thread will
  // most likely take after it, or -1. Blocks until all are done.
  template <class Task>
  void run(ThreadPool& pool, Task&& task) {
    pool.parallel_for(num_shares_, [&](int64_t own, int thread) {
      for (int64_t i = 0; i < num_shares_; ++i) {
        Share& share = shares_[(own + i) % num_shares_];
        for (;;) {
          // Relaxed: items are independent, and parallel_for orders their results.
          const int64_t item = share.next.fetch_add(1, std::memory_order_relaxed);
          if (item >= share.end) break;
          task(item, item + 1 < share.end ? item + 1 : -1, thread);
        }
      }
    });
  }

 private:
  static constexpr int64_t kMaxShares =
      64;  // more threads than this help the others from the start

  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  const int64_t num_shares_;
  std::array<Share, kMaxShares> shares_;
};

}  // namespace rollpack::kernels::cpu
