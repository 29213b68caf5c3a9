// A fixed set of threads that run one loop at a time. Tasks are claimed from an atomic counter, so
// a thread that the system does not schedule delays nobody: the caller works through the whole loop
// itself if it must, and waits only for the workers that did join.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace rollpack::kernels::cpu {

// CPUs that each thread of a pool may run on; empty: wherever the system puts them, which is best
// where all memory is equally near: a thread that could not move would wait for whoever else is on
// its core, such as the trainer.
using ThreadPlaces = std::vector<std::vector<int>>;

// Spreads the threads of `num_processes` equal processes, of which this is `process_index`, over
// the memory nodes whose CPUs are `nodes` (kernels/usable_cores.h), in proportion to those:
// consecutive threads share a node, each may use all of its CPUs. Empty for a single node.
ThreadPlaces spread_over_nodes(const std::vector<std::vector<int>>& nodes, int num_threads,
                               int process_index, int num_processes);

class ThreadPool {
 public:
  // num_threads computing threads, at least 1: the caller of parallel_for and num_threads - 1
  // workers, which go to their places or inherit the affinity mask of the constructing thread. The
  // system may refuse a place; the thread then runs where it may.
  explicit ThreadPool(int num_threads, ThreadPlaces places = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Keeps the calling thread at the place of thread 0 for a scope, so that what it touches first
  // lies near it. Costs nothing where there are no places.
  class CallerAtPlace {
   public:
    explicit CallerAtPlace(const ThreadPool& pool);
    ~CallerAtPlace();
    CallerAtPlace(const CallerAtPlace&) = delete;
    CallerAtPlace& operator=(const CallerAtPlace&) = delete;

   private:
    std::vector<int> former_cpus_;
  };

  // Calls task(index, thread) once for every index in [0, num_tasks), each thread taking ascending
  // indices; thread is in [0, num_threads()), 0 for the caller. Returns when all calls have; what
  // they wrote is then visible to the caller. Not reentrant, one caller at a time.
  // Errors: rethrows the first exception of a task; tasks not yet claimed are then dropped.
  template <class Task>
  void parallel_for(int64_t num_tasks, Task&& task) {
    using T = std::remove_reference_t<Task>;
    run({.call = [](void* context, int64_t index, int thread) {
           (*static_cast<T*>(context))(index, thread);
         },
         .context = const_cast<void*>(static_cast<const void*>(&task)),
         .num_tasks = num_tasks});
  }

 private:
  struct Loop {
    void (*call)(void* context, int64_t index, int thread) = nullptr;
    void* context = nullptr;
    int64_t num_tasks = 0;
  };

  void run(const Loop& loop);
  void work(int thread);
  void worker_main(int thread);
  void await_loop(uint32_t seen);
  bool enter();
  void leave();

  // Set in gate_ while workers may join the loop; the low bits count those inside.
  static constexpr uint32_t kOpen = 1u << 31;

  const ThreadPlaces places_;
  Loop loop_;  // written while the gate is shut and empty, read by those inside
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> gate_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};  // counts loops; workers sleep on it
  std::atomic<bool> is_stopping_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
  std::vector<std::thread> workers_;
};

}  // namespace rollpack::kernels::cpu
