// What the backend asks of a device besides kernels: memory, copies, streams, waits. One
// implementation over the CUDA runtime, one on the host for tests (emulation/).
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/launch_shape.h"

namespace rollpack::kernels::cuda {

struct DeviceInfo {
  std::string name;                // "NVIDIA H100 80GB HBM3"
  std::string description;         // with compute capability, driver and the image in use
  std::string fingerprint;         // what of device and build decides bits
  std::array<std::byte, 16> id{};  // of this very device, among all there are
  int64_t total_bytes = 0;
  int64_t max_shared_bytes = 48 * 1024;  // that a block may ask for
  int32_t num_multiprocessors = 1;
};

// Every error names the call and what CUDA said of it: resource_exhausted for memory, unavailable
// for a device that is lost, internal for the rest.
class Device {
 public:
  virtual ~Device() = default;

  virtual const DeviceInfo& info() const = 0;
  virtual const KernelSet& kernels() const = 0;
  // Before a thread's first other call.
  virtual void bind_thread() = 0;
  virtual int64_t free_bytes() = 0;

  // Zero-filled, aligned to 256 bytes. `what` goes into the error.
  virtual void* alloc(int64_t bytes, const char* what) = 0;
  virtual void free(void* memory) noexcept = 0;
  // Addresses, for at least so many bytes, whose memory may come and go; nobody may touch them
  // until map() has put zeroed memory behind them, nor after unmap(), before which all work on it
  // is waited for. `what` goes into errors and lives as long as the range.
  virtual void* reserve(int64_t bytes, const char* what) = 0;
  virtual void map(void* range) = 0;
  virtual void unmap(void* range) = 0;
  virtual void release(void* range) noexcept = 0;
  // Host memory that copies reach without a detour.
  virtual void* alloc_host(int64_t bytes, const char* what) = 0;
  virtual void free_host(void* memory) noexcept = 0;

  virtual Stream make_stream() = 0;
  virtual void free_stream(Stream stream) noexcept = 0;

  // Whose times are known where it `is_timed`.
  virtual Event make_event(bool is_timed = false) = 0;
  virtual void free_event(Event event) noexcept = 0;
  // The event stands for all that is enqueued on the stream so far.
  virtual void record(Event event, Stream stream) = 0;
  // Whether that is done. Errors: those of the work.
  virtual bool has_passed(Event event) = 0;
  // From one to the other on the device; both are timed and have passed.
  virtual double seconds_between(Event begin, Event end) = 0;

  // Enqueued on the stream; host memory must last until it is waited for.
  virtual void copy_to_device(Stream stream, void* target, const void* source, int64_t bytes) = 0;
  virtual void copy_to_host(Stream stream, void* target, const void* source, int64_t bytes) = 0;
  virtual void copy_on_device(Stream stream, void* target, const void* source, int64_t bytes) = 0;
  virtual void clear(Stream stream, void* target, int64_t bytes) = 0;
  // `num_rows` rows of `width` bytes each, their starts `pitch` bytes apart in the target and close
  // together in the source.
  virtual void copy_rows_to_device(Stream stream, void* target, int64_t pitch, const void* source,
                                   int64_t width, int64_t num_rows) = 0;
  // The same the other way: starts are `pitch` bytes apart in the source.
  virtual void copy_rows_to_host(Stream stream, void* target, const void* source, int64_t pitch,
                                 int64_t width, int64_t num_rows) = 0;

  // What this thread enqueues on the stream from here to end_capture() is recorded, with all its
  // arguments, and not done. Meanwhile the thread makes no other call than those that enqueue on
  // this stream: it allocates nothing and asks for no event or stream.
  virtual void begin_capture(Stream stream) = 0;
  // Ends the capture; the graph is ready to be launched and has all memory that it needs. Errors:
  // those of what was enqueued; resource_exhausted.
  virtual Graph end_capture(Stream stream) = 0;
  // Ends it and forgets what was recorded.
  virtual void abandon_capture(Stream stream) noexcept = 0;
  // Enqueues what was recorded: the same kernels and copies with the same arguments, in their
  // order.
  virtual void launch(Stream stream, Graph graph) = 0;
  // Its launches have ended.
  virtual void free_graph(Graph graph) noexcept = 0;

  // Returns when all of the stream's work is done.
  // Errors: those of the work; deadline_exceeded with the work still running.
  virtual void wait(Stream stream, std::chrono::steady_clock::time_point deadline) = 0;
};

// Memory that frees itself, of the kind that `kAlloc` and `kFree` of Device make.
template <auto kAlloc, auto kFree>
class OwnMemory {
 public:
  OwnMemory() = default;
  OwnMemory(Device& device, int64_t bytes, const char* what)
      : device_(&device), data_((device.*kAlloc)(bytes, what)), bytes_(bytes) {}
  OwnMemory(OwnMemory&& other) noexcept { *this = std::move(other); }
  OwnMemory& operator=(OwnMemory&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~OwnMemory() {
    if (data_ != nullptr) (device_->*kFree)(data_);
  }

  template <class T = std::byte>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  Device* device_ = nullptr;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

using DeviceMemory = OwnMemory<&Device::alloc, &Device::free>;
using HostMemory = OwnMemory<&Device::alloc_host, &Device::free_host>;  // pinned

// Memory that keeps its addresses while it is given back and taken again; made with memory.
class DeviceRange {
 public:
  DeviceRange() = default;
  DeviceRange(Device& device, int64_t bytes, const char* what)
      : device_(&device), data_(device.reserve(bytes, what)), bytes_(bytes) {
    try {
      take();
    } catch (...) {
      device.release(data_);
      throw;
    }
  }
  DeviceRange(DeviceRange&& other) noexcept { *this = std::move(other); }
  DeviceRange& operator=(DeviceRange&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(has_memory_, other.has_memory_);
    return *this;
  }
  ~DeviceRange() {
    if (data_ != nullptr) device_->release(data_);
  }

  void give_back() {
    if (data_ == nullptr) return;
    device_->unmap(data_);
    has_memory_ = false;
  }
  // Errors: resource_exhausted; it is without memory then.
  void take() {
    if (data_ == nullptr) return;
    device_->map(data_);
    has_memory_ = true;
  }
  bool has_memory() const { return has_memory_; }

  template <class T = std::byte>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }
  int64_t held_bytes() const { return has_memory_ ? bytes_ : 0; }

 private:
  Device* device_ = nullptr;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  bool has_memory_ = false;
};

// An event that frees itself.
class OwnEvent {
 public:
  explicit OwnEvent(Device& device, bool is_timed = false)
      : device_(device), event_(device.make_event(is_timed)) {}
  ~OwnEvent() { device_.free_event(event_); }
  OwnEvent(const OwnEvent&) = delete;
  OwnEvent& operator=(const OwnEvent&) = delete;
  operator Event() const { return event_; }

 private:
  Device& device_;
  Event event_;
};

// A graph that frees itself.
class OwnGraph {
 public:
  OwnGraph(Device& device, Graph graph) : device_(&device), graph_(graph) {}
  OwnGraph(OwnGraph&& other) noexcept
      : device_(std::exchange(other.device_, nullptr)), graph_(other.graph_) {}
  OwnGraph& operator=(OwnGraph&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(graph_, other.graph_);
    return *this;
  }
  ~OwnGraph() {
    if (device_ != nullptr) device_->free_graph(graph_);
  }
  operator Graph() const { return graph_; }

 private:
  Device* device_ = nullptr;
  Graph graph_;
};

// A stream that frees itself.
class OwnStream {
 public:
  explicit OwnStream(Device& device) : device_(device), stream_(device.make_stream()) {}
  ~OwnStream() { device_.free_stream(stream_); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  operator Stream() const { return stream_; }

 private:
  Device& device_;
  Stream stream_;
};

}  // namespace rollpack::kernels::cuda
