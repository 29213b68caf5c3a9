// Runs the blocks of an emulated kernel, one after the other: each thread of a block is a fiber.
// The order of blocks, and which warp goes on when several could, are drawn from a seed, so that
// code which lacks a barrier gives other numbers or NaN under some seed. Everything that a GPU
// would leave undefined or hang at is an error that names the kernel and the block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/emulation/fiber.h"
#include "kernels/cuda/launch_shape.h"

namespace rollpack::kernels::cuda::emulation {

inline constexpr uint32_t kWarpLanes = 32;

// What a warp does together: all its lanes arrive, then combine() sees all their records at once.
struct WarpCall {
  const char* name = "";
  void (*combine)(void* const* records) = nullptr;  // [32], by lane
};

// A copy that cp_async_16 asked for, performed when it is waited for and not before.
struct AsyncCopy {
  std::byte* target = nullptr;
  const std::byte* source = nullptr;  // null: zeros
  int64_t group = 0;
};

class BlockRunner {
 public:
  // The runner of this OS thread.
  static BlockRunner& of_this_thread();

  // Runs body(context) on every thread of every block of `shape`.
  // Errors: internal, naming kernel and block: threads that wait at a barrier for others which
  // ended or wait elsewhere; warps whose lanes call different things; writes past the end of shared
  // memory; addresses of ldmatrix and cp.async that are not aligned or lie outside of it.
  void run(const LaunchShape& shape, void (*body)(void*), void* context);

  // From inside of a running thread.
  void wait_for_block(const char* name);
  void wait_for_warp(const WarpCall& call, void* record);
  void copy_async(void* shared, const void* global, bool is_valid);
  void commit_copies();
  void wait_for_copies(int64_t groups_left);
  std::byte* shared_memory() const { return shared_; }
  // Fails unless [address, address + 16) is shared memory of this block and a multiple of 16.
  void require_shared(const void* address, const char* what) const;

  [[noreturn]] void fail(const std::string& what) const;

 private:
  enum class State : uint8_t { kReady, kAtBlock, kAtWarp, kDone };
  struct Thread {
    std::unique_ptr<Fiber> fiber;
    State state = State::kDone;
    const char* waits_at = "";
    WarpCall call;
    void* record = nullptr;
    std::vector<AsyncCopy> copies;
    int64_t group = 0;  // of the next copy
  };

  void run_block(const LaunchShape& shape, void (*body)(void*), void* context);
  bool run_some_warp();
  bool run_warp(uint32_t warp);
  void complete_warp_call(uint32_t warp);
  bool release_block();
  void prepare_shared(int64_t bytes);
  void check_shared_end() const;
  [[noreturn]] void fail_stuck() const;
  uint32_t draw(uint32_t end);

  const LaunchShape* shape_ = nullptr;
  std::vector<Thread> threads_;
  uint32_t num_threads_ = 0;
  Thread* running_ = nullptr;
  std::vector<std::byte> arena_;
  std::byte* shared_ = nullptr;
  int64_t shared_bytes_ = 0;
  uint64_t random_ = 0;
};

// What the order of blocks and warps is drawn from; 0 at the start. Every launch draws anew.
void set_seed(uint64_t seed);

}  // namespace rollpack::kernels::cuda::emulation

// CUDA's own names. Set before a thread goes on.
struct SimtIndex {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local constinit SimtIndex threadIdx, blockIdx;
inline thread_local constinit SimtIndex blockDim{1, 1, 1}, gridDim{1, 1, 1};
