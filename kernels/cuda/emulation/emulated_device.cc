#include "kernels/cuda/emulation/emulated_device.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/cuda/emulation/emulated_stream.h"
#include "kernels/cuda/emulation/recording.h"
#include "kernels/cuda/launchers.h"

namespace rollpack::kernels::cuda {
namespace {

using emulation::EmulatedStream;
using emulation::Recording;
using emulation::require_no_capture;

constexpr size_t kAlignment = 256;
constexpr size_t kPageBytes = size_t{64} << 10;  // in which ranges get memory; 2 MiB on devices

class EmulatedDevice final : public Device {
 public:
  explicit EmulatedDevice(const EmulatedDeviceOptions& options) : options_(options) {
    info_ = {.name = "emulated",
             .description = "kernels emulated on the host",
             .fingerprint = "emulated",
             .total_bytes = options.total_bytes,
             .max_shared_bytes = options.max_shared_bytes,
             .num_multiprocessors = options.num_multiprocessors};
    const int32_t number = options.number >= 0 ? options.number : next_number();
    std::memcpy(info_.id.data(), &number, sizeof number);
  }

  const DeviceInfo& info() const override { return info_; }
  const KernelSet& kernels() const override { return emulated::kernel_set(); }
  void bind_thread() override {}
  int64_t free_bytes() override {
    const std::lock_guard lock(mutex_);
    return info_.total_bytes - used_;
  }

  void* alloc(int64_t bytes, const char* what) override {
    require_no_capture("alloc");
    const std::lock_guard lock(mutex_);
    const size_t size = (static_cast<size_t>(bytes) + kAlignment) / kAlignment * kAlignment;
    void* const memory = bytes >= 0 && bytes <= info_.total_bytes - used_
                             ? std::aligned_alloc(kAlignment, size)
                             : nullptr;
    if (memory == nullptr) fail_memory(what, bytes);
    std::memset(memory, 0, size);
    sizes_[memory] = bytes;
    used_ += bytes;
    note_memory(what, memory, bytes);
    return memory;
  }
  void free(void* memory) noexcept override {
    finish_all();
    const std::lock_guard lock(mutex_);
    const auto at = sizes_.find(memory);
    if (at == sizes_.end()) std::abort();  // not ours, or freed before
    used_ -= at->second;
    sizes_.erase(at);
    forget_memory(memory);
    std::free(memory);
  }
  // What is not mapped faults, as on a device.
  void* reserve(int64_t bytes, const char* what) override {
    require_no_capture("reserve");
    const size_t size = (static_cast<size_t>(bytes) + kPageBytes - 1) / kPageBytes * kPageBytes;
    void* const at =
        mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) fail_memory(what, bytes);
    const std::lock_guard lock(mutex_);
    ranges_[at] = {.size = size, .bytes = bytes, .what = what};
    return at;
  }
  void map(void* range) override {
    require_no_capture("map");
    const std::lock_guard lock(mutex_);
    Range& of = ranges_.at(range);
    if (of.is_mapped) return;
    const auto bytes = static_cast<int64_t>(of.size);
    if (bytes > info_.total_bytes - used_) fail_memory(of.what, bytes);
    map_over(range, of.size, PROT_READ | PROT_WRITE);
    used_ += bytes;
    of.is_mapped = true;
    note_memory(of.what, range, of.bytes);
  }
  void unmap(void* range) override {
    require_no_capture("unmap");
    const std::lock_guard lock(mutex_);
    Range& of = ranges_.at(range);
    if (!std::exchange(of.is_mapped, false)) return;
    map_over(range, of.size, PROT_NONE);
    forget_memory(range);
    used_ -= static_cast<int64_t>(of.size);
  }
  void release(void* range) noexcept override {
    const std::lock_guard lock(mutex_);
    const auto at = ranges_.find(range);
    if (at == ranges_.end()) std::abort();  // not ours, or released before
    if (at->second.is_mapped) used_ -= static_cast<int64_t>(at->second.size);
    forget_memory(range);
    munmap(range, at->second.size);
    ranges_.erase(at);
  }
  void* alloc_host(int64_t bytes, const char*) override {
    require_no_capture("alloc_host");
    return ::operator new(size_t(bytes));
  }
  void free_host(void* memory) noexcept override {
    finish_all();
    ::operator delete(memory);
  }

  Stream make_stream() override {
    const std::lock_guard lock(mutex_);
    streams_.push_back(std::make_unique<EmulatedStream>(options_.defers));
    return {streams_.back().get()};
  }
  void free_stream(Stream stream) noexcept override {
    finish_all();
    const std::lock_guard lock(mutex_);
    std::erase_if(streams_, [&](const auto& known) { return known.get() == stream.handle; });
  }
  Event make_event(bool) override { return {new Moment}; }
  void free_event(Event event) noexcept override { delete static_cast<Moment*>(event.handle); }
  void record(Event event, Stream stream) override {
    require_no_capture("record");
    auto* const of = static_cast<EmulatedStream*>(stream.handle);
    *static_cast<Moment*>(event.handle) = {of, of == nullptr ? 0 : of->num_enqueued()};
  }
  bool has_passed(Event event) override {
    require_no_capture("has_passed");
    const Moment& moment = *static_cast<Moment*>(event.handle);
    return moment.stream == nullptr || moment.stream->has_done(moment.num_enqueued);
  }
  double seconds_between(Event, Event) override { return 1e-6; }

  void copy_to_device(Stream stream, void* target, const void* source, int64_t bytes) override {
    copy(stream, target, source, bytes);
  }
  void copy_to_host(Stream stream, void* target, const void* source, int64_t bytes) override {
    copy(stream, target, source, bytes);
  }
  void copy_on_device(Stream stream, void* target, const void* source, int64_t bytes) override {
    copy(stream, target, source, bytes);
  }
  void clear(Stream stream, void* target, int64_t bytes) override {
    enqueue(stream, "clear", [=] { std::memset(target, 0, static_cast<size_t>(bytes)); });
  }
  void copy_rows_to_device(Stream stream, void* target, int64_t pitch, const void* source,
                           int64_t width, int64_t num_rows) override {
    copy_rows(stream, target, pitch, source, width, width, num_rows);
  }
  void copy_rows_to_host(Stream stream, void* target, const void* source, int64_t pitch,
                         int64_t width, int64_t num_rows) override {
    copy_rows(stream, target, width, source, pitch, width, num_rows);
  }

  void begin_capture(Stream stream) override { emulation::begin_recording(stream); }
  Graph end_capture(Stream stream) override {
    auto recording = std::make_unique<Recording>(emulation::end_recording(stream));
    const std::lock_guard lock(mutex_);
    const int64_t bytes = bytes_of(*recording);
    if (bytes > info_.total_bytes - used_) fail_memory("device, a graph", bytes);
    used_ += bytes;
    if (options_.log) {
      std::vector<std::string>& names = options_.log->graphs.emplace_back();
      for (const emulation::RecordedWork& work : *recording) names.push_back(work.name);
    }
    return {recording.release()};
  }
  void abandon_capture(Stream stream) noexcept override { emulation::end_recording(stream); }
  void launch(Stream stream, Graph graph) override {
    enqueue(stream, "a graph", [=] {
      for (emulation::RecordedWork& work : *static_cast<Recording*>(graph.handle)) work.run();
    });
    if (options_.log) ++options_.log->num_graph_launches;
  }
  void free_graph(Graph graph) noexcept override {
    auto* const recording = static_cast<Recording*>(graph.handle);
    const std::lock_guard lock(mutex_);
    used_ -= bytes_of(*recording);
    delete recording;
  }

  void wait(Stream stream, std::chrono::steady_clock::time_point) override {
    require_no_capture("wait");
    if (stream.handle != nullptr) static_cast<EmulatedStream*>(stream.handle)->finish();
  }

 private:
  // What an event stands for.
  struct Moment {
    EmulatedStream* stream = nullptr;
    int64_t num_enqueued = 0;
  };

  // Behind those that tests choose.
  static int32_t next_number() {
    static std::atomic<int32_t> next{1000};
    return next++;
  }

  struct Range {
    size_t size = 0;    // in whole pages
    int64_t bytes = 0;  // as asked for
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

  void note_memory(const char* what, void* memory, int64_t bytes) {
    if (!options_.log) return;
    options_.log->memory.emplace(what,
                                 EmulatedDeviceLog::Memory{static_cast<std::byte*>(memory), bytes});
  }
  void forget_memory(const void* memory) {
    if (!options_.log) return;
    std::erase_if(options_.log->memory,
                  [&](const auto& known) { return known.second.data == memory; });
  }

  // As freeing memory does on a device. Errors of the work are its stream's next wait's to tell, or
  // nobody's.
  void finish_all() noexcept {
    std::vector<EmulatedStream*> streams;
    {
      const std::lock_guard lock(mutex_);
      for (const auto& stream : streams_) streams.push_back(stream.get());
    }
    for (EmulatedStream* stream : streams) {
      try {
        stream->finish();
      } catch (const Error&) {
        continue;
      }
    }
  }

  static void enqueue(Stream stream, const char* what, std::function<void()> work) {
    emulation::submit(stream, what, std::move(work));
  }
  static void copy(Stream stream, void* target, const void* source, int64_t bytes) {
    enqueue(stream, "copy", [=] { std::memcpy(target, source, static_cast<size_t>(bytes)); });
  }
  static void copy_rows(Stream stream, void* target, int64_t target_pitch, const void* source,
                        int64_t source_pitch, int64_t width, int64_t num_rows) {
    enqueue(stream, "copy", [=] {
      for (int64_t row = 0; row < num_rows; ++row) {
        std::memcpy(static_cast<std::byte*>(target) + row * target_pitch,
                    static_cast<const std::byte*>(source) + row * source_pitch,
                    static_cast<size_t>(width));
      }
    });
  }
  int64_t bytes_of(const Recording& recording) const {
    return options_.graph_work_bytes * static_cast<int64_t>(recording.size());
  }

  const EmulatedDeviceOptions options_;
  DeviceInfo info_;
  std::mutex mutex_;
  std::map<void*, Range> ranges_;
  std::map<void*, int64_t> sizes_;
  std::vector<std::unique_ptr<EmulatedStream>> streams_;
  int64_t used_ = 0;
};

}  // namespace

std::unique_ptr<Device> make_emulated_device(const EmulatedDeviceOptions& options) {
  return std::make_unique<EmulatedDevice>(options);
}

}  // namespace rollpack::kernels::cuda
