#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <time.h>

#include <array>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "kernels/cpu/float_mode.h"
#include "kernels/usable_cores.h"

namespace rollpack::kernels::cpu {
namespace {

double cpu_seconds(clockid_t clock) {
  timespec time = {};
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}
double process_cpu_seconds() {
  return cpu_seconds(CLOCK_PROCESS_CPUTIME_ID);
}
double thread_cpu_seconds() {
  return cpu_seconds(CLOCK_THREAD_CPUTIME_ID);
}

TEST(ThreadPool, EveryTaskRunsOnceForAnyNumberOfThreads) {
  for (const int num_threads : {1, 2, 3, 16}) {  // 16: more threads than CPUs
    ThreadPool pool(num_threads);
    EXPECT_EQ(pool.num_threads(), num_threads);
    for (const int64_t num_tasks : {0, 1, 2, 7, 1000}) {
      std::vector<int> calls(static_cast<size_t>(num_tasks), 0);
      pool.parallel_for(num_tasks, [&](int64_t index, int thread) {
        ++calls[static_cast<size_t>(index)];
        EXPECT_TRUE(thread >= 0 && thread < num_threads);
      });
      EXPECT_EQ(calls, std::vector<int>(static_cast<size_t>(num_tasks), 1)) << num_threads;
    }
  }
}

TEST(ThreadPool, ResultsOfOneLoopAreVisibleToTheNext) {
  ThreadPool pool(8);
  std::vector<int64_t> values(64, 0);
  for (int round = 0; round < 2000; ++round) {
    pool.parallel_for(64, [&](int64_t i, int) { values[static_cast<size_t>(63 - i)] += i; });
  }
  for (size_t i = 0; i < 64; ++i) EXPECT_EQ(values[i], 2000 * static_cast<int64_t>(63 - i));
}

TEST(ThreadPool, ExceptionsReachTheCallerAndThePoolStaysUsable) {
  ThreadPool pool(3);
  for (int round = 0; round < 50; ++round) {
    EXPECT_THROW(pool.parallel_for(100,
                                   [](int64_t i, int) {
                                     if (i % 10 == 3) throw std::runtime_error("task");
                                   }),
                 std::runtime_error);
    std::atomic<int> count = 0;
    pool.parallel_for(100, [&](int64_t, int) { count.fetch_add(1, std::memory_order_relaxed); });
    EXPECT_EQ(count.load(), 100);
  }
}

TEST(ThreadPool, TenMillisecondsAfterALoopThreadsUseNoCpu) {
  ThreadPool pool(4);
  pool.parallel_for(64, [](int64_t, int) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  const double before = process_cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  // Three spinning threads would use 0.9 s. What a thread that got no CPU so far has left to spin
  // is 0.1 ms, so a busy machine does not matter.
  EXPECT_LT(process_cpu_seconds() - before, 0.005);
}

// A thread that waits for one that is not scheduled sleeps too.
TEST(ThreadPool, TheCallerSleepsWhileAWorkerIsAtItsTask) {
  ThreadPool pool(2);
  const auto sleeps_in_one_task = [&] {
    std::atomic<int> num_inside = 0;
    double caller_s = 0;
    pool.parallel_for(2, [&](int64_t, int thread) {
      num_inside.fetch_add(1);
      while (num_inside.load() < 2) std::this_thread::yield();  // one task a thread
      if (thread == 1) std::this_thread::sleep_for(std::chrono::milliseconds(100));
      if (thread == 0) caller_s = thread_cpu_seconds();
    });
    return thread_cpu_seconds() - caller_s;
  };
  EXPECT_LT(sleeps_in_one_task(), 0.01);
}

TEST(ThreadPool, WorkersFlushSubnormals) {
  ThreadPool pool(4);
  std::atomic<int> wrong = 0;
  pool.parallel_for(64, [&](int64_t, int thread) {
    const unsigned mode = _mm_getcsr() & (kFlushToZero | kDenormalsAreZero);
    if (thread != 0 && mode != (kFlushToZero | kDenormalsAreZero)) wrong.fetch_add(1);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // so that workers take part
  });
  EXPECT_EQ(wrong.load(), 0);
}

TEST(ThreadPool, ThreadsOfEqualProcessesAreSpreadOverMemoryNodes) {
  const std::vector<std::vector<int>> nodes = {{0, 1, 4, 5}, {2, 3, 6, 7}};
  const std::vector<int>&a = nodes[0], &b = nodes[1];
  EXPECT_EQ(spread_over_nodes(nodes, 4, 0, 1), (ThreadPlaces{a, a, b, b}));
  EXPECT_EQ(spread_over_nodes(nodes, 2, 0, 2), (ThreadPlaces{a, a}));
  EXPECT_EQ(spread_over_nodes(nodes, 2, 1, 2), (ThreadPlaces{b, b}));
  EXPECT_EQ(spread_over_nodes(nodes, 1, 2, 3), (ThreadPlaces{b}));
  EXPECT_EQ(spread_over_nodes(nodes, 20, 0, 1).back(), b);  // more threads than CPUs
  EXPECT_EQ(spread_over_nodes({{0}, {1, 2, 3}}, 4, 0, 1),
            (ThreadPlaces{{0}, {1, 2, 3}, {1, 2, 3}, {1, 2, 3}}));
  EXPECT_EQ(spread_over_nodes({{0, 1, 2}}, 2, 0, 1), ThreadPlaces{});
}

TEST(ThreadPool, ThreadsGoToTheirPlacesAndTheCallerOnlyForAScope) {
  const std::vector<int> all = affinity_cpus();
  const std::vector<int> first = {all.front()}, last = {all.back()};
  ThreadPool pool(2, {first, last});
  std::array<std::vector<int>, 2> cpus;
  {
    const ThreadPool::CallerAtPlace here(pool);
    std::atomic<int> num_inside = 0;
    pool.parallel_for(2, [&](int64_t, int thread) {
      num_inside.fetch_add(1);
      while (num_inside.load() < 2) std::this_thread::yield();  // one task a thread
      cpus[static_cast<size_t>(thread)] = affinity_cpus();
    });
  }
  EXPECT_EQ(cpus[0], first);
  EXPECT_EQ(cpus[1], last);
  EXPECT_EQ(affinity_cpus(), all);
}

TEST(ThreadPool, APlaceThatDoesNotExistIsAdviceOnly) {
  const std::vector<int> all = affinity_cpus();
  ThreadPool pool(2, {{4000}, {4001}});
  const ThreadPool::CallerAtPlace here(pool);
  EXPECT_EQ(affinity_cpus(), all);
  std::atomic<int> count = 0;
  pool.parallel_for(10, [&](int64_t, int) { count.fetch_add(1); });
  EXPECT_EQ(count.load(), 10);
}

}  // namespace
}  // namespace rollpack::kernels::cpu
