#include "kernels/cuda/emulation/block_runner.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "kernels/base/error.h"

namespace rollpack::kernels::cuda::emulation {
namespace {

// Every byte of shared memory at the start of a block: a NaN as f32 and as bf16, -1 as an integer.
constexpr int kPoison = 0xff;
// Behind the shared memory of a block; no write may reach it.
constexpr int64_t kTailBytes = 1024;
constexpr uint64_t kAlignment = 128;

std::atomic<uint64_t> next_seed{0};

uint64_t mixed(uint64_t z) {  // splitmix64
  z += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

}  // namespace

void set_seed(uint64_t seed) {
  next_seed.store(seed << 32, std::memory_order_relaxed);
}

BlockRunner& BlockRunner::of_this_thread() {
  thread_local BlockRunner runner;
  return runner;
}

uint32_t BlockRunner::draw(uint32_t end) {
  random_ = mixed(random_);
  return static_cast<uint32_t>(random_ >> 33) % end;
}

void BlockRunner::run(const LaunchShape& shape, void (*body)(void*), void* context) {
  if (running_ != nullptr) fail("a kernel was launched by a kernel");
  shape_ = &shape;
  random_ = mixed(next_seed.fetch_add(1, std::memory_order_relaxed));
  const uint64_t num_blocks = uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  if (num_blocks == 0 || num_blocks > UINT32_MAX || shape.block == 0 || shape.block > 1024 ||
      shape.block % kWarpLanes != 0 || shape.grid.y > 65535 || shape.grid.z > 65535 ||
      shape.shared_bytes < 0 || shape.shared_bytes > 227 * 1024) {
    fail_invariant(fmt::format(
        "launch of kernel {}: grid ({}, {}, {}), block {}, {} bytes of "
        "shared memory are no legal shape",
        shape.kernel, shape.grid.x, shape.grid.y, shape.grid.z, shape.block, shape.shared_bytes));
  }
  std::vector<uint32_t> order(num_blocks);
  std::iota(order.begin(), order.end(), 0);
  for (auto i = static_cast<uint32_t>(num_blocks); i > 1; --i)
    std::swap(order[i - 1], order[draw(i)]);
  while (threads_.size() < shape.block) {
    threads_.emplace_back().fiber = std::make_unique<Fiber>();
  }
  blockDim = {shape.block, 1, 1};
  gridDim = {shape.grid.x, shape.grid.y, shape.grid.z};
  for (const uint32_t block : order) {
    blockIdx = {block % shape.grid.x, block / shape.grid.x % shape.grid.y,
                block / shape.grid.x / shape.grid.y};
    run_block(shape, body, context);
  }
}

void BlockRunner::run_block(const LaunchShape& shape, void (*body)(void*), void* context) {
  prepare_shared(shape.shared_bytes);
  num_threads_ = shape.block;
  for (uint32_t t = 0; t < num_threads_; ++t) {
    Thread& thread = threads_[t];
    thread.fiber->start(body, context);
    thread.state = State::kReady;
    thread.copies.clear();
    thread.group = 0;
  }
  for (;;) {
    if (run_some_warp()) continue;
    const auto is_done = [](const Thread& thread) { return thread.state == State::kDone; };
    if (std::all_of(threads_.begin(), threads_.begin() + num_threads_, is_done)) break;
    if (!release_block()) fail_stuck();
  }
  check_shared_end();
}

bool BlockRunner::run_some_warp() {
  const uint32_t num_warps = num_threads_ / kWarpLanes;
  const uint32_t first = draw(num_warps);
  for (uint32_t i = 0; i < num_warps; ++i) {
    if (run_warp((first + i) % num_warps)) return true;
  }
  return false;
}

// Runs the lanes that are ready; whether there was one.
bool BlockRunner::run_warp(uint32_t warp) {
  bool has_run = false;
  const uint32_t first = draw(kWarpLanes);
  for (uint32_t i = 0; i < kWarpLanes; ++i) {
    const uint32_t t = warp * kWarpLanes + (first + i) % kWarpLanes;
    Thread& thread = threads_[t];
    if (thread.state != State::kReady) continue;
    has_run = true;
    threadIdx = {t, 0, 0};
    running_ = &thread;
    try {
      thread.fiber->resume();
    } catch (...) {
      running_ = nullptr;
      throw;
    }
    running_ = nullptr;
    if (thread.fiber->is_done()) thread.state = State::kDone;
  }
  if (has_run) complete_warp_call(warp);
  return has_run;
}

void BlockRunner::complete_warp_call(uint32_t warp) {
  Thread* const lanes = &threads_[warp * kWarpLanes];
  void* records[kWarpLanes];
  for (uint32_t i = 0; i < kWarpLanes; ++i) {
    if (lanes[i].state != State::kAtWarp || lanes[i].call.combine != lanes[0].call.combine) return;
    records[i] = lanes[i].record;
  }
  lanes[0].call.combine(records);
  for (uint32_t i = 0; i < kWarpLanes; ++i) lanes[i].state = State::kReady;
}

// Whether all threads of the block wait at the same barrier, and go on from there.
bool BlockRunner::release_block() {
  for (uint32_t t = 0; t < num_threads_; ++t) {
    if (threads_[t].state != State::kAtBlock) return false;
  }
  for (uint32_t t = 0; t < num_threads_; ++t) threads_[t].state = State::kReady;
  return true;
}

void BlockRunner::wait_for_block(const char* name) {
  running_->state = State::kAtBlock;
  running_->waits_at = name;
  Fiber::suspend();
}

void BlockRunner::wait_for_warp(const WarpCall& call, void* record) {
  running_->state = State::kAtWarp;
  running_->waits_at = call.name;
  running_->call = call;
  running_->record = record;
  Fiber::suspend();
}

void BlockRunner::copy_async(void* shared, const void* global, bool is_valid) {
  require_shared(shared, "cp.async");
  if (is_valid && reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail("cp.async from an address that is no multiple of 16");
  }
  running_->copies.push_back({.target = static_cast<std::byte*>(shared),
                              .source = is_valid ? static_cast<const std::byte*>(global) : nullptr,
                              .group = running_->group});
  // Until it is waited for, nobody knows what the target holds.
  std::memset(shared, kPoison, 16);
}

void BlockRunner::commit_copies() {
  ++running_->group;
}

void BlockRunner::wait_for_copies(int64_t groups_left) {
  std::vector<AsyncCopy>& copies = running_->copies;
  size_t num_done = 0;
  while (num_done < copies.size() && copies[num_done].group < running_->group - groups_left) {
    const AsyncCopy& copy = copies[num_done++];
    if (copy.source != nullptr)
      std::memcpy(copy.target, copy.source, 16);
    else
      std::memset(copy.target, 0, 16);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(num_done));
}

void BlockRunner::prepare_shared(int64_t bytes) {
  const auto needed = static_cast<size_t>(bytes + kTailBytes) + kAlignment;
  if (arena_.size() < needed) arena_.resize(needed);
  const auto address = reinterpret_cast<uintptr_t>(arena_.data());
  shared_ = arena_.data() + (kAlignment - address % kAlignment) % kAlignment;
  shared_bytes_ = bytes;
  std::memset(shared_, kPoison, static_cast<size_t>(bytes + kTailBytes));
}

void BlockRunner::check_shared_end() const {
  const std::byte* const tail = shared_ + shared_bytes_;
  const auto* const written = std::find_if(
      tail, tail + kTailBytes, [](std::byte b) { return b != static_cast<std::byte>(kPoison); });
  if (written != tail + kTailBytes) {
    fail(fmt::format("byte {} of shared memory was written; the launch asks for {}",
                     written - shared_, shared_bytes_));
  }
}

void BlockRunner::require_shared(const void* address, const char* what) const {
  const auto* const byte = static_cast<const std::byte*>(address);
  const std::ptrdiff_t offset = byte - shared_;
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0 || offset < 0 || offset + 16 > shared_bytes_) {
    fail(fmt::format("{} at byte {} of {} of shared memory: no 16 bytes of it, aligned to 16", what,
                     offset, shared_bytes_));
  }
}

void BlockRunner::fail(const std::string& what) const {
  fail_invariant(fmt::format("kernel {}, block ({}, {}, {}), thread {}: {}", shape_->kernel,
                             blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, what));
}

void BlockRunner::fail_stuck() const {
  std::vector<std::pair<std::string, int>> places;
  for (uint32_t t = 0; t < num_threads_; ++t) {
    const std::string place = threads_[t].state == State::kDone
                                  ? "have ended"
                                  : fmt::format("wait at {}", threads_[t].waits_at);
    const auto same = [&](const auto& known) { return known.first == place; };
    const auto at = std::find_if(places.begin(), places.end(), same);
    if (at == places.end())
      places.emplace_back(place, 1);
    else
      ++at->second;
  }
  std::string text;
  for (const auto& [place, count] : places) {
    text += fmt::format("{}{} threads {}", text.empty() ? "" : ", ", count, place);
  }
  fail_invariant(fmt::format("kernel {}, block ({}, {}, {}): {}", shape_->kernel, blockIdx.x,
                             blockIdx.y, blockIdx.z, text));
}

}  // namespace rollpack::kernels::cuda::emulation
