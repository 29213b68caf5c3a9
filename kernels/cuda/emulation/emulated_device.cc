#include "kernels/cuda/emulation/emulated_device.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/cuda/launchers.h"

namespace rollpack::kernels::cuda {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kPageBytes = size_t{64} << 10;  // in which ranges get memory; 2 MiB on devices

class EmulatedDevice final : public Device {
 public:
  explicit EmulatedDevice(const EmulatedDeviceOptions& options) {
    info_ = {.name = "emulated",
             .description = "kernels emulated on the host",
             .fingerprint = "emulated",
             .total_bytes = options.total_bytes,
             .max_shared_bytes = options.max_shared_bytes,
             .num_multiprocessors = options.num_multiprocessors};
  }

  const DeviceInfo& info() const override { return info_; }
  const KernelSet& kernels() const override { return emulated::kernel_set(); }
  void bind_thread() override {}
  int64_t free_bytes() override {
    const std::lock_guard lock(mutex_);
    return info_.total_bytes - used_;
  }

  void* alloc(int64_t bytes, const char* what) override {
    const std::lock_guard lock(mutex_);
    const size_t size = (static_cast<size_t>(bytes) + kAlignment) / kAlignment * kAlignment;
    void* const memory = bytes >= 0 && bytes <= info_.total_bytes - used_
                             ? std::aligned_alloc(kAlignment, size)
                             : nullptr;
    if (memory == nullptr) fail_memory(what, bytes);
    std::memset(memory, 0, size);
    sizes_[memory] = bytes;
    used_ += bytes;
    return memory;
  }
  void free(void* memory) noexcept override {
    const std::lock_guard lock(mutex_);
    const auto at = sizes_.find(memory);
    if (at == sizes_.end()) std::abort();  // not ours, or freed before
    used_ -= at->second;
    sizes_.erase(at);
    std::free(memory);
  }
  // What is not mapped faults, as on a device.
  void* reserve(int64_t bytes, const char* what) override {
    const size_t size = (static_cast<size_t>(bytes) + kPageBytes - 1) / kPageBytes * kPageBytes;
    void* const at =
        mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) fail_memory(what, bytes);
    const std::lock_guard lock(mutex_);
    ranges_[at] = {.size = size, .what = what};
    return at;
  }
  void map(void* range) override {
    const std::lock_guard lock(mutex_);
    Range& of = ranges_.at(range);
    if (of.is_mapped) return;
    const auto bytes = static_cast<int64_t>(of.size);
    if (bytes > info_.total_bytes - used_) fail_memory(of.what, bytes);
    map_over(range, of.size, PROT_READ | PROT_WRITE);
    used_ += bytes;
    of.is_mapped = true;
  }
  void unmap(void* range) override {
    const std::lock_guard lock(mutex_);
    Range& of = ranges_.at(range);
    if (!std::exchange(of.is_mapped, false)) return;
    map_over(range, of.size, PROT_NONE);
    used_ -= static_cast<int64_t>(of.size);
  }
  void release(void* range) noexcept override {
    const std::lock_guard lock(mutex_);
    const auto at = ranges_.find(range);
    if (at == ranges_.end()) std::abort();  // not ours, or released before
    if (at->second.is_mapped) used_ -= static_cast<int64_t>(at->second.size);
    munmap(range, at->second.size);
    ranges_.erase(at);
  }
  void* alloc_host(int64_t bytes, const char*) override { return ::operator new(size_t(bytes)); }
  void free_host(void* memory) noexcept override { ::operator delete(memory); }

  Stream make_stream() override { return {}; }
  void free_stream(Stream) noexcept override {}
  Event make_event() override { return {}; }
  void free_event(Event) noexcept override {}
  void record(Event, Stream) override {}
  bool has_passed(Event) override { return true; }  // work is done when it is enqueued

  void copy_to_device(Stream, void* target, const void* source, int64_t bytes) override {
    std::memcpy(target, source, static_cast<size_t>(bytes));
  }
  void copy_to_host(Stream, void* target, const void* source, int64_t bytes) override {
    std::memcpy(target, source, static_cast<size_t>(bytes));
  }
  void copy_on_device(Stream, void* target, const void* source, int64_t bytes) override {
    std::memcpy(target, source, static_cast<size_t>(bytes));
  }
  void clear(Stream, void* target, int64_t bytes) override {
    std::memset(target, 0, static_cast<size_t>(bytes));
  }
  void copy_rows_to_device(Stream, void* target, int64_t pitch, const void* source, int64_t width,
                           int64_t num_rows) override {
    for (int64_t row = 0; row < num_rows; ++row) {
      std::memcpy(static_cast<std::byte*>(target) + row * pitch,
                  static_cast<const std::byte*>(source) + row * width, static_cast<size_t>(width));
    }
  }
  void wait(Stream, std::chrono::steady_clock::time_point) override {}

 private:
  struct Range {
    size_t size = 0;
    const char* what = "";
    bool is_mapped = false;
  };

  [[noreturn]] void fail_memory(const char* what, int64_t bytes) const {
    throw Error({.code = ErrorCode::kResourceExhausted,
                 .field = what,
                 .value = fmt::format("{} bytes", bytes),
                 .allowed = fmt::format("at most {} bytes", info_.total_bytes - used_),
                 .message = "the emulated device has no such memory"});
  }
  static void map_over(void* at, size_t size, int protection) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    if (mmap(at, size, protection, kFlags, -1, 0) == MAP_FAILED) {
      fail_invariant("the host refused to map over its own memory");
    }
  }

  DeviceInfo info_;
  std::mutex mutex_;
  std::map<void*, Range> ranges_;
  std::map<void*, int64_t> sizes_;
  int64_t used_ = 0;
};

}  // namespace

std::unique_ptr<Device> make_emulated_device(const EmulatedDeviceOptions& options) {
  return std::make_unique<EmulatedDevice>(options);
}

}  // namespace rollpack::kernels::cuda
