#include "kernels/cuda/driver_memory.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <utility>

#include "kernels/base/error.h"
#include "kernels/cuda/cudart_device.h"

namespace rollpack::kernels::cuda {
namespace {

// The version of the driver's interface that the functions below are those of.
constexpr unsigned kInterface = 10020;

template <class Function>
Function find_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, kInterface, cudaEnableDefault, &found);
  if (error != cudaSuccess) fail_call(error, name);
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    fail_call(cudaErrorSymbolNotFound, name);
  }
  return reinterpret_cast<Function>(function);
}

struct Driver {
  PFN_cuMemGetAllocationGranularity_v10020 granularity =
      find_function<PFN_cuMemGetAllocationGranularity_v10020>("cuMemGetAllocationGranularity");
  PFN_cuMemAddressReserve_v10020 reserve =
      find_function<PFN_cuMemAddressReserve_v10020>("cuMemAddressReserve");
  PFN_cuMemAddressFree_v10020 free_addresses =
      find_function<PFN_cuMemAddressFree_v10020>("cuMemAddressFree");
  PFN_cuMemCreate_v10020 create = find_function<PFN_cuMemCreate_v10020>("cuMemCreate");
  PFN_cuMemRelease_v10020 release = find_function<PFN_cuMemRelease_v10020>("cuMemRelease");
  PFN_cuMemMap_v10020 map = find_function<PFN_cuMemMap_v10020>("cuMemMap");
  PFN_cuMemUnmap_v10020 unmap = find_function<PFN_cuMemUnmap_v10020>("cuMemUnmap");
  PFN_cuMemSetAccess_v10020 set_access = find_function<PFN_cuMemSetAccess_v10020>("cuMemSetAccess");
};

const Driver& driver() {
  static const Driver found;
  return found;
}

// The numbers of both interfaces' errors are the same.
void check(CUresult result, const char* call, const char* what, size_t bytes) {
  if (result == CUDA_SUCCESS) return;
  fail_call(static_cast<cudaError_t>(result), fmt::format("{} for {}", call, what),
            fmt::format("{} bytes", bytes));
}

CUdeviceptr address(void* range) {
  return reinterpret_cast<CUdeviceptr>(range);
}

}  // namespace

CUmemAllocationProp DriverMemory::properties() const {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device_;
  return properties;
}

void* DriverMemory::reserve(int64_t bytes, const char* what) {
  const CUmemAllocationProp wanted = properties();
  size_t page = 0;
  check(driver().granularity(&page, &wanted, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
        "cuMemGetAllocationGranularity", what, static_cast<size_t>(bytes));
  const size_t size = (static_cast<size_t>(bytes) + page - 1) / page * page;
  CUdeviceptr at = 0;
  check(driver().reserve(&at, size, 0, 0, 0), "cuMemAddressReserve", what, size);
  void* const range = reinterpret_cast<void*>(at);
  const std::lock_guard lock(mutex_);
  ranges_[range] = {.size = size, .what = what};
  return range;
}

DriverMemory::Range& DriverMemory::find(void* range) {
  const auto found = ranges_.find(range);
  if (found == ranges_.end()) fail_invariant("an address range that was not reserved here");
  return found->second;
}

void DriverMemory::map(void* range) {
  const std::lock_guard lock(mutex_);
  Range& of = find(range);
  if (of.is_mapped) return;
  const CUmemAllocationProp wanted = properties();
  check(driver().create(&of.handle, of.size, &wanted, 0), "cuMemCreate", of.what, of.size);
  const CUmemAccessDesc access{.location = wanted.location,
                               .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CUresult result = driver().map(address(range), of.size, 0, of.handle, 0);
  const char* call = "cuMemMap";
  if (result == CUDA_SUCCESS) {
    call = "cuMemSetAccess";
    result = driver().set_access(address(range), of.size, &access, 1);
    if (result != CUDA_SUCCESS) driver().unmap(address(range), of.size);
  }
  if (result != CUDA_SUCCESS) {
    driver().release(of.handle);
    check(result, call, of.what, of.size);
  }
  of.is_mapped = true;
  check(static_cast<CUresult>(cudaMemset(range, 0, of.size)), "cudaMemset", of.what, of.size);
  check(static_cast<CUresult>(cudaStreamSynchronize(nullptr)), "cudaStreamSynchronize", of.what,
        of.size);
}

void DriverMemory::unmap(void* range) {
  const std::lock_guard lock(mutex_);
  Range& of = find(range);
  if (!std::exchange(of.is_mapped, false)) return;
  check(driver().unmap(address(range), of.size), "cuMemUnmap", of.what, of.size);
  check(driver().release(of.handle), "cuMemRelease", of.what, of.size);
}

void DriverMemory::release(void* range) noexcept {
  const std::lock_guard lock(mutex_);
  const auto found = ranges_.find(range);
  if (found == ranges_.end()) return;
  const Range& of = found->second;
  if (of.is_mapped) {
    driver().unmap(address(range), of.size);
    driver().release(of.handle);
  }
  driver().free_addresses(address(range), of.size);
  ranges_.erase(found);
}

}  // namespace rollpack::kernels::cuda
