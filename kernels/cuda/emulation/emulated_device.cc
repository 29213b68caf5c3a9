#include "kernels/cuda/emulation/emulated_device.h"

#include <fmt/format.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "kernels/base/error.h"
#include "kernels/cuda/launchers.h"

namespace rollpack::kernels::cuda {
namespace {

constexpr size_t kAlignment = 256;

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
    if (memory == nullptr) {
      throw Error({.code = ErrorCode::kResourceExhausted,
                   .field = what,
                   .value = fmt::format("{} bytes", bytes),
                   .allowed = fmt::format("at most {} bytes", info_.total_bytes - used_),
                   .message = "the emulated device has no such memory"});
    }
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
  DeviceInfo info_;
  std::mutex mutex_;
  std::map<void*, int64_t> sizes_;
  int64_t used_ = 0;
};

}  // namespace

std::unique_ptr<Device> make_emulated_device(const EmulatedDeviceOptions& options) {
  return std::make_unique<EmulatedDevice>(options);
}

}  // namespace rollpack::kernels::cuda
