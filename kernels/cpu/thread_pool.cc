#include "kernels/cpu/thread_pool.h"

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <utility>

#include "kernels/cpu/float_mode.h"

namespace rollpack::kernels::cpu {
namespace {

// A pause lasts 40 to 140 cycles on current cores, so this is some 30 to 100 us: longer than the
// serial gap between two ops of a step, shorter than a scheduler's time slice.
constexpr int kSpins = 2000;

}  // namespace

int num_available_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) {
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  }
  return std::max(1, CPU_COUNT(&set));
}

ThreadPool::ThreadPool(int num_threads) {
  const int count = num_threads > 0 ? num_threads : num_available_cpus();
  workers_.reserve(static_cast<size_t>(count - 1));
  for (int thread = 1; thread < count; ++thread) {
    workers_.emplace_back([this, thread] { worker_main(thread); });
  }
}

ThreadPool::~ThreadPool() {
  is_stopping_.store(true, std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);  // pairs with the acquire in await_loop()
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(const Loop& loop) {
  if (loop.num_tasks <= 0) return;
  loop_ = loop;
  error_ = nullptr;
  next_.store(0, std::memory_order_relaxed);
  const bool is_shared = loop.num_tasks > 1 && !workers_.empty();
  if (is_shared) {
    gate_.store(kOpen, std::memory_order_release);   // pairs with the acquire in enter()
    epoch_.fetch_add(1, std::memory_order_release);  // pairs with the acquire in await_loop()
    epoch_.notify_all();
  }
  work(0);
  if (is_shared) {
    // Acquire: what the workers wrote before leave() is visible from here on.
    uint32_t inside = gate_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
    for (int spin = 0; inside != 0; ++spin) {
      if (spin < kSpins) {
        _mm_pause();
      } else {
        gate_.wait(inside, std::memory_order_acquire);
      }
      inside = gate_.load(std::memory_order_acquire);  // pairs with the release in leave()
    }
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::work(int thread) {
  try {
    for (;;) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= loop_.num_tasks) return;
      loop_.call(loop_.context, index, thread);
    }
  } catch (...) {
    next_.store(loop_.num_tasks, std::memory_order_relaxed);
    const std::lock_guard lock(error_mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

void ThreadPool::worker_main(int thread) {
  flush_subnormals();
  uint32_t seen = 0;
  for (;;) {
    await_loop(seen);
    seen = epoch_.load(std::memory_order_acquire);
    if (is_stopping_.load(std::memory_order_relaxed)) return;
    if (!enter()) continue;  // woke too late: the loop is over
    work(thread);
    leave();
  }
}

void ThreadPool::await_loop(uint32_t seen) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (epoch_.load(std::memory_order_acquire) != seen) return;
    _mm_pause();
  }
  epoch_.wait(seen, std::memory_order_acquire);  // pairs with the release in run()
}

bool ThreadPool::enter() {
  uint32_t gate = gate_.load(std::memory_order_relaxed);
  while ((gate & kOpen) != 0) {
    if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire,
                                    std::memory_order_relaxed)) {
      return true;
    }
  }
  return false;
}

void ThreadPool::leave() {
  // Release: pairs with the caller's acquire loads of gate_ in run().
  if (gate_.fetch_sub(1, std::memory_order_release) == 1) gate_.notify_one();
}

}  // namespace rollpack::kernels::cpu
