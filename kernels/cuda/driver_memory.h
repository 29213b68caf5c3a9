// Address ranges of a device that outlive the memory behind them, over the driver's virtual memory
// calls. Those are looked up at run time, as the CUDA runtime looks up the driver: the program
// links neither. Source: CUDA driver API, "Virtual Memory Management".
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace rollpack::kernels::cuda {

// Thread-safe. Errors, all: "device, .." naming the call, with the CUDA runtime's words for them.
class DriverMemory {
 public:
  explicit DriverMemory(int device) : device_(device) {}

  // Device::reserve, map, unmap and release.
  void* reserve(int64_t bytes, const char* what);
  void map(void* range);
  void unmap(void* range);
  void release(void* range) noexcept;

 private:
  struct Range {
    size_t size = 0;  // in whole pages of the device
    const char* what = "";
    CUmemGenericAllocationHandle handle = 0;
    bool is_mapped = false;
  };

  CUmemAllocationProp properties() const;
  Range& find(void* range);

  const int device_;
  std::mutex mutex_;
  std::map<void*, Range> ranges_;
};

}  // namespace rollpack::kernels::cuda
