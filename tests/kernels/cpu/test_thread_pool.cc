#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <time.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "kernels/cpu/float_mode.h"

namespace rollpack::kernels::cpu {
namespace {

double process_cpu_seconds() {
  timespec time = {};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
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

TEST(ThreadPool, IdleThreadsUseNoCpu) {
  ThreadPool pool(4);
  pool.parallel_for(64, [](int64_t, int) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // the spins of the last loop end
  const double before = process_cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(400));
  // Three spinning threads would use 1.2 s.
  EXPECT_LT(process_cpu_seconds() - before, 0.2);
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

TEST(ThreadPool, ThreadsAreCountedFromTheAffinityMask) {
  std::thread([] {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
    EXPECT_EQ(num_available_cpus(), 1);
    EXPECT_EQ(ThreadPool(0).num_threads(), 1);
  }).join();
}

}  // namespace
}  // namespace rollpack::kernels::cpu
