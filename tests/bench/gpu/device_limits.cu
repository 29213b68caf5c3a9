// Two loops without a bottleneck but the one that is measured: products of registers, and a sum
// over 2 GiB, which no cache holds. Best of a few runs each.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "kernels/base/error.h"
#include "kernels/cuda/simt.h"
#include "tests/bench/gpu/device_limits.h"

namespace rollpack::bench {
namespace {

constexpr int kRuns = 5;
constexpr int kThreads = 256;
constexpr int kChains = 8;  // independent accumulators a warp
constexpr int kProducts = 2048;
constexpr int64_t kBytes = int64_t{2} << 30;

void require(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  throw Error({.code = ErrorCode::kInternal,
               .field = std::string("device limits, ") + what,
               .message = cudaGetErrorString(code)});
}

__global__ void __launch_bounds__(kThreads) multiply(float* out) {
  const uint32_t a[4] = {0x3f803f80u, threadIdx.x, 0x3f803f80u, 0x3f803f80u};
  const uint32_t b[2] = {0x3f803f80u, threadIdx.x};
  float acc[kChains][4] = {};
  for (int i = 0; i < kProducts; ++i) {
    ROLLPACK_UNROLL_WHOLLY
    for (int c = 0; c < kChains; ++c) kernels::cuda::mma_bf16_m16n8k16(acc[c], a, b);
  }
  float sum = 0;
  ROLLPACK_UNROLL_WHOLLY
  for (int c = 0; c < kChains; ++c) sum += acc[c][0] + acc[c][1] + acc[c][2] + acc[c][3];
  if (sum == -1.0f) *out = sum;  // never: the products must not be left out
}

__global__ void __launch_bounds__(kThreads) read(const uint4* in, int64_t count, uint32_t* out) {
  uint32_t bits = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  ROLLPACK_UNROLL(8)
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < count;
       i += stride) {
    const uint4 at = in[i];
    bits |= at.x | at.y | at.z | at.w;
  }
  if (bits == 1) *out = bits;  // never: the memory is 0
}

// Seconds of the fastest of some runs of `launch`, after one that is not counted.
template <class Launch>
double best_seconds(Launch launch) {
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin), "event");
  require(cudaEventCreate(&end), "event");
  launch();
  double best = 1e30;
  for (int run = 0; run < kRuns; ++run) {
    require(cudaEventRecord(begin), "record");
    launch();
    require(cudaGetLastError(), "launch");
    require(cudaEventRecord(end), "record");
    require(cudaEventSynchronize(end), "run");
    float ms = 0;
    require(cudaEventElapsedTime(&ms, begin, end), "time");
    best = std::min(best, static_cast<double>(ms) / 1000);
  }
  require(cudaEventDestroy(begin), "event");
  require(cudaEventDestroy(end), "event");
  return best;
}

}  // namespace

DeviceLimits measure_device_limits() {
  int device = 0, multiprocessors = 0;
  require(cudaGetDevice(&device), "device");
  require(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
          "multiprocessors");
  void* memory = nullptr;
  require(cudaMalloc(&memory, kBytes), "memory");
  require(cudaMemset(memory, 0, kBytes), "memory");
  const auto blocks = static_cast<unsigned>(multiprocessors * 8);
  DeviceLimits limits;
  const double products =
      best_seconds([&] { multiply<<<blocks, kThreads>>>(static_cast<float*>(memory)); });
  const double warps = static_cast<double>(blocks) * kThreads / 32;
  limits.bf16_flops = warps * kProducts * kChains * (2.0 * 16 * 8 * 16) / products;
  const double reading = best_seconds([&] {
    read<<<blocks, kThreads>>>(static_cast<const uint4*>(memory), kBytes / 16,
                               static_cast<uint32_t*>(memory));
  });
  limits.bytes_per_second = static_cast<double>(kBytes) / reading;
  require(cudaFree(memory), "memory");
  return limits;
}

}  // namespace rollpack::bench
