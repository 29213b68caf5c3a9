#include "kernels/cuda/cudart_device.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/cuda/device_choice.h"
#include "kernels/cuda/driver_memory.h"
#include "kernels/cuda/launch_shape.h"

namespace rollpack::kernels::cuda {

// Of the compiled kernels; defined in kernels.cu.
const KernelSet& compiled_kernel_set();
int probe_image();

namespace {

constexpr int kOldestMajor = 8;  // cp.async, bf16 products
constexpr const char* kImages = ROLLPACK_CUDA_IMAGES;

std::string version_text(int version) {
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

std::string driver_text() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return "no driver";
  return fmt::format("driver for CUDA {}", version_text(version));
}

ErrorCode code_of(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return ErrorCode::kResourceExhausted;
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorECCUncorrectable:
    case cudaErrorHardwareStackError:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidPc:
    case cudaErrorAssert:
    case cudaErrorContained:
      return ErrorCode::kUnavailable;  // the context is lost, and with it this process's device
    default:
      return ErrorCode::kInternal;
  }
}

// `call` begins the field, so that the backend can tell errors of the device and add its step.
[[noreturn]] void fail(cudaError_t error, std::string call, std::string value = {}) {
  throw Error(
      {.code = code_of(error),
       .field = "device, " + std::move(call),
       .value = std::move(value),
       .message = fmt::format("{}: {}", cudaGetErrorName(error), cudaGetErrorString(error))});
}

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) fail(error, call);
}

class CudartDevice final : public Device {
 public:
  explicit CudartDevice(int device) : device_(device), ranges_(device) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    bind_thread();
    info_ = {.name = properties.name,
             .description = fmt::format("device {}, {}, compute capability {}.{}, {}, images {}",
                                        device, properties.name, properties.major, properties.minor,
                                        driver_text(), kImages),
             .fingerprint = fmt::format("sm_{}{} toolkit {} images {}", properties.major,
                                        properties.minor, version_text(CUDART_VERSION), kImages),
             .total_bytes = static_cast<int64_t>(properties.totalGlobalMem),
             .max_shared_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin),
             .num_multiprocessors = properties.multiProcessorCount};
    static_assert(sizeof properties.uuid.bytes == sizeof info_.id);
    std::memcpy(info_.id.data(), properties.uuid.bytes, sizeof info_.id);
  }

  const DeviceInfo& info() const override { return info_; }
  const KernelSet& kernels() const override { return compiled_kernel_set(); }
  void bind_thread() override { check(cudaSetDevice(device_), "cudaSetDevice"); }
  int64_t free_bytes() override {
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    return static_cast<int64_t>(free);
  }

  void* alloc(int64_t bytes, const char* what) override {
    void* memory = nullptr;
    const auto size = static_cast<size_t>(std::max<int64_t>(bytes, 1));
    const cudaError_t error = cudaMalloc(&memory, size);
    if (error != cudaSuccess) {
      cudaGetLastError();  // else the next launch would report it
      fail(error, fmt::format("memory for {}", what), fmt::format("{} bytes", bytes));
    }
    check(cudaMemset(memory, 0, size), "cudaMemset");
    check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
    return memory;
  }
  void free(void* memory) noexcept override { cudaFree(memory); }
  void* reserve(int64_t bytes, const char* what) override { return ranges_.reserve(bytes, what); }
  void map(void* range) override { ranges_.map(range); }
  void unmap(void* range) override { ranges_.unmap(range); }
  void release(void* range) noexcept override { ranges_.release(range); }
  void* alloc_host(int64_t bytes, const char* what) override {
    void* memory = nullptr;
    const cudaError_t error =
        cudaHostAlloc(&memory, static_cast<size_t>(bytes), cudaHostAllocDefault);
    if (error != cudaSuccess) {
      cudaGetLastError();
      fail(error, fmt::format("pinned host memory for {}", what), fmt::format("{} bytes", bytes));
    }
    return memory;
  }
  void free_host(void* memory) noexcept override { cudaFreeHost(memory); }

  Stream make_stream() override {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    return {stream};
  }
  void free_stream(Stream stream) noexcept override { cudaStreamDestroy(handle(stream)); }

  Event make_event(bool is_timed) override {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, is_timed ? cudaEventDefault : cudaEventDisableTiming),
          "cudaEventCreateWithFlags");
    return {event};
  }
  void free_event(Event event) noexcept override {
    cudaEventDestroy(static_cast<cudaEvent_t>(event.handle));
  }
  void record(Event event, Stream stream) override {
    check(cudaEventRecord(static_cast<cudaEvent_t>(event.handle), handle(stream)),
          "cudaEventRecord");
  }
  bool has_passed(Event event) override {
    const cudaError_t state = cudaEventQuery(static_cast<cudaEvent_t>(event.handle));
    if (state != cudaSuccess && state != cudaErrorNotReady) fail(state, "work on a stream");
    return state == cudaSuccess;
  }
  double seconds_between(Event begin, Event end) override {
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, static_cast<cudaEvent_t>(begin.handle),
                               static_cast<cudaEvent_t>(end.handle)),
          "cudaEventElapsedTime");
    return static_cast<double>(milliseconds) * 1e-3;
  }

  void copy_to_device(Stream stream, void* target, const void* source, int64_t bytes) override {
    copy(stream, target, source, bytes, cudaMemcpyHostToDevice);
  }
  void copy_to_host(Stream stream, void* target, const void* source, int64_t bytes) override {
    copy(stream, target, source, bytes, cudaMemcpyDeviceToHost);
  }
  void copy_on_device(Stream stream, void* target, const void* source, int64_t bytes) override {
    copy(stream, target, source, bytes, cudaMemcpyDeviceToDevice);
  }
  void copy_rows_to_device(Stream stream, void* target, int64_t pitch, const void* source,
                           int64_t width, int64_t num_rows) override {
    check(cudaMemcpy2DAsync(target, static_cast<size_t>(pitch), source, static_cast<size_t>(width),
                            static_cast<size_t>(width), static_cast<size_t>(num_rows),
                            cudaMemcpyHostToDevice, handle(stream)),
          "cudaMemcpy2DAsync");
  }
  void copy_rows_to_host(Stream stream, void* target, const void* source, int64_t pitch,
                         int64_t width, int64_t num_rows) override {
    check(cudaMemcpy2DAsync(target, static_cast<size_t>(width), source, static_cast<size_t>(pitch),
                            static_cast<size_t>(width), static_cast<size_t>(num_rows),
                            cudaMemcpyDeviceToHost, handle(stream)),
          "cudaMemcpy2DAsync");
  }
  void clear(Stream stream, void* target, int64_t bytes) override {
    if (bytes == 0) return;
    check(cudaMemsetAsync(target, 0, static_cast<size_t>(bytes), handle(stream)),
          "cudaMemsetAsync");
  }

  // Relaxed: a kernel that is first launched here is loaded from its image meanwhile, which the
  // stricter modes take for an allocation and refuse.
  void begin_capture(Stream stream) override {
    check(cudaStreamBeginCapture(handle(stream), cudaStreamCaptureModeRelaxed),
          "cudaStreamBeginCapture");
  }
  Graph end_capture(Stream stream) override {
    cudaGraph_t recorded = nullptr;
    check(cudaStreamEndCapture(handle(stream), &recorded), "cudaStreamEndCapture");
    cudaGraphExec_t graph = nullptr;
    cudaError_t error = cudaGraphInstantiate(&graph, recorded, 0);
    cudaGraphDestroy(recorded);
    if (error != cudaSuccess) fail_capture(error, "cudaGraphInstantiate");
    error = cudaGraphUpload(graph, handle(stream));  // else the first launch would allocate
    if (error == cudaSuccess) return {graph};
    cudaGraphExecDestroy(graph);
    fail_capture(error, "cudaGraphUpload");
  }
  void abandon_capture(Stream stream) noexcept override {
    cudaGraph_t recorded = nullptr;
    cudaStreamEndCapture(handle(stream), &recorded);
    if (recorded != nullptr) cudaGraphDestroy(recorded);
    cudaGetLastError();  // what broke the capture has been thrown already
  }
  void launch(Stream stream, Graph graph) override {
    check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph.handle), handle(stream)),
          "cudaGraphLaunch");
  }
  void free_graph(Graph graph) noexcept override {
    cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph.handle));
  }

  // Polls: a wait inside of CUDA has no deadline. A step is milliseconds, so the first hundred
  // microseconds are spun through and then some slept.
  void wait(Stream stream, std::chrono::steady_clock::time_point deadline) override {
    const auto begin = std::chrono::steady_clock::now();
    for (;;) {
      const cudaError_t state = cudaStreamQuery(handle(stream));
      if (state == cudaSuccess) return;
      if (state != cudaErrorNotReady) fail(state, "work on a stream");
      const auto now = std::chrono::steady_clock::now();
      if (now > deadline) {
        throw Error({.code = ErrorCode::kDeadlineExceeded,
                     .field = "device, work on a stream",
                     .message = "it has not ended"});
      }
      if (now - begin < std::chrono::microseconds(100))
        std::this_thread::yield();
      else
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }

 private:
  static cudaStream_t handle(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }
  [[noreturn]] static void fail_capture(cudaError_t error, const char* call) {
    cudaGetLastError();  // else the next launch would report it
    fail(error, call);
  }
  static void copy(Stream stream, void* target, const void* source, int64_t bytes,
                   cudaMemcpyKind kind) {
    if (bytes == 0) return;
    check(cudaMemcpyAsync(target, source, static_cast<size_t>(bytes), kind, handle(stream)),
          "cudaMemcpyAsync");
  }

  const int device_;
  DriverMemory ranges_;
  DeviceInfo info_;
};

}  // namespace

void fail_call(int error, std::string call, std::string value) {
  fail(static_cast<cudaError_t>(error), std::move(call), std::move(value));
}

void fail_launch(const LaunchShape& shape, int code) {
  fail(static_cast<cudaError_t>(code), fmt::format("kernel {}", shape.kernel),
       fmt::format("grid ({}, {}, {}), block {}, {} bytes of shared memory", shape.grid.x,
                   shape.grid.y, shape.grid.z, shape.block, shape.shared_bytes));
}

namespace {

// Empty, or why there are none.
std::string count_devices(int& count) {
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return "";
  cudaGetLastError();
  return fmt::format("no CUDA device can be used: {} ({}; built for {})",
                     error == cudaSuccess ? "no device is visible" : cudaGetErrorString(error),
                     driver_text(), kImages);
}

// Empty, or why it cannot be used.
std::string why_not(int device) {
  check(cudaSetDevice(device), "cudaSetDevice");
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "cudaDeviceGetAttribute");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  const std::string text =
      fmt::format("device {}, {}, compute capability {}.{}, {}; built for {}", device,
                  properties.name, major, minor, driver_text(), kImages);
  if (major < kOldestMajor) {
    return fmt::format("older than compute capability {}.0: {}", kOldestMajor, text);
  }
  const auto image = static_cast<cudaError_t>(probe_image());
  if (image == cudaSuccess) return "";
  cudaGetLastError();
  return fmt::format("no built image runs ({}) on {}", cudaGetErrorString(image), text);
}

[[noreturn]] void refuse(std::string reason) {
  throw Error({.code = ErrorCode::kUnsupported,
               .field = "engine.backend",
               .value = "cuda",
               .message = std::move(reason)});
}

}  // namespace

std::string why_no_device() {
  int count = 0;
  const std::string reason = count_devices(count);
  return reason.empty() ? why_not(0) : reason;
}

std::unique_ptr<Device> make_cudart_device(int rank_on_node) {
  int count = 0;
  if (std::string reason = count_devices(count); !reason.empty()) refuse(std::move(reason));
  const int device = choose_device(rank_on_node, count);
  if (std::string reason = why_not(device); !reason.empty()) refuse(std::move(reason));
  return std::make_unique<CudartDevice>(device);
}

}  // namespace rollpack::kernels::cuda
