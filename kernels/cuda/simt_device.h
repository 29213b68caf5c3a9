// simt.h for devices, compiled by nvcc: inline PTX and the launch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/launch_shape.h"

namespace rollpack::kernels::cuda {

// Throws the error of a launch, naming the kernel; `code` is a cudaError_t. Defined on the host.
[[noreturn]] void fail_launch(const LaunchShape& shape, int code);

inline namespace compiled {

__device__ __forceinline__ std::byte* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char rollpack_dynamic_shared[];
  return reinterpret_cast<std::byte*>(rollpack_dynamic_shared);
}

__device__ __forceinline__ void mma_bf16_m16n8k16(float (&acc)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
}

// Launches kernel(args...). Errors of the launch itself are thrown at once; those of its run come
// with the stream's next wait.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, Stream stream, Args... args) {
  // Above 48 KiB a kernel has to ask, and the device's own limit may say no.
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  static_cast<int>(shape.shared_bytes));
    if (code != cudaSuccess) fail_launch(shape, code);
  }
  kernel<<<dim3(shape.grid.x, shape.grid.y, shape.grid.z), dim3(shape.block),
           static_cast<size_t>(shape.shared_bytes), static_cast<cudaStream_t>(stream.handle)>>>(
      static_cast<Params>(args)...);
  const cudaError_t code = cudaGetLastError();
  if (code != cudaSuccess) fail_launch(shape, code);
}

}  // namespace compiled
}  // namespace rollpack::kernels::cuda
