#include "kernels/cpu/thread_pool.h"

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/cpu/float_mode.h"
#include "kernels/usable_cores.h"

namespace rollpack::kernels::cpu {
namespace {

// A pause lasts 40 to 140 cycles on current cores, so this is some 30 to 100 us: longer than the
// serial gap between two ops of a step, shorter than a scheduler's time slice.
constexpr int kSpins = 2000;

// Advice: where the system refuses, the thread computes all the same.
void move_to(const std::vector<int>& cpus) {
  const int capacity = std::ranges::max(cpus) + 1;
  const size_t bytes = CPU_ALLOC_SIZE(capacity);
  std::vector<cpu_set_t> set((bytes + sizeof(cpu_set_t) - 1) / sizeof(cpu_set_t));
  for (const int cpu : cpus) CPU_SET_S(cpu, bytes, set.data());
  sched_setaffinity(0, bytes, set.data());
}

}  // namespace

ThreadPlaces spread_over_nodes(const std::vector<std::vector<int>>& nodes, int num_threads,
                               int process_index, int num_processes) {
  if (nodes.size() < 2) return {};
  int64_t num_cpus = 0;
  for (const auto& cpus : nodes) num_cpus += static_cast<int64_t>(cpus.size());
  const int64_t all = int64_t{num_threads} * num_processes;
  ThreadPlaces places;
  for (int thread = 0; thread < num_threads; ++thread) {
    // Threads in order along the CPUs in order of their nodes.
    int64_t at = (int64_t{process_index} * num_threads + thread) * num_cpus / all;
    size_t node = 0;
    while (at >= static_cast<int64_t>(nodes[node].size())) {
      at -= static_cast<int64_t>(nodes[node++].size());
    }
    places.push_back(nodes[node]);
  }
  return places;
}

ThreadPool::CallerAtPlace::CallerAtPlace(const ThreadPool& pool) {
  if (pool.places_.empty()) return;
  former_cpus_ = affinity_cpus();
  move_to(pool.places_.front());
}

ThreadPool::CallerAtPlace::~CallerAtPlace() {
  if (!former_cpus_.empty()) move_to(former_cpus_);
}

ThreadPool::ThreadPool(int num_threads, ThreadPlaces places) : places_(std::move(places)) {
  if (num_threads < 1 || (!places_.empty() && std::ssize(places_) != num_threads)) {
    fail_invariant("a thread pool has a thread at least, and a place for each or none");
  }
  workers_.reserve(static_cast<size_t>(num_threads - 1));
  for (int thread = 1; thread < num_threads; ++thread) {
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
  if (!places_.empty()) move_to(places_[static_cast<size_t>(thread)]);
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
