// The few names of CUDA that our kernels use, so that one source is compiled by nvcc for devices
// and by the host's compiler for the emulation (ROLLPACK_SIMT_EMULATION), which runs it in tests
// without a device. Included by .cu files and by headers that only they include.
//
// Both give, with CUDA's meaning:
//   __global__  __device__  __host__  __forceinline__  __launch_bounds__(n)
//   threadIdx.x  blockIdx.{x,y,z}  blockDim.x  gridDim.{x,y,z}
//   __syncthreads()  __syncwarp()  __threadfence()
//   __shfl_sync  __shfl_xor_sync  __shfl_up_sync  __shfl_down_sync  __ballot_sync
//     of 4 and 8 byte values, always with kAllLanes and all 32 lanes: the emulation knows no others
//   __popc  __ffs  __clz  atomicAdd(int*, int)  atomicOr(unsigned*, unsigned)
// and, below: dynamic_shared, mma_bf16_m16n8k16, ldmatrix_x4, ldmatrix_x4_trans, cp_async_*,
// launch. Static __shared__ variables are not among them: use dynamic_shared().
//
// The two live in different inline namespaces, so that one program may hold both: whatever calls
// these names belongs into namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT (or is local to
// a file). Code that is compiled once reaches kernels through the table of kernel_set.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/host_device.h"
#include "kernels/cuda/launch_shape.h"

#if defined(ROLLPACK_SIMT_EMULATION)
#define ROLLPACK_SIMT emulated
#elif defined(__CUDACC__)
#define ROLLPACK_SIMT compiled
#else
#error "simt.h is for .cu files: compile with nvcc, or with -DROLLPACK_SIMT_EMULATION=1"
#endif

// Before a loop: how often its body is repeated, 1 for not at all. Registers are what it costs.
// Loops over arrays that are to stay in registers are unrolled wholly.
#define ROLLPACK_PRAGMA(text) _Pragma(#text)
#if defined(ROLLPACK_SIMT_EMULATION)
#define ROLLPACK_UNROLL(count) ROLLPACK_PRAGMA(GCC unroll count)
#define ROLLPACK_UNROLL_WHOLLY
#else
#define ROLLPACK_UNROLL(count) ROLLPACK_PRAGMA(unroll count)
#define ROLLPACK_UNROLL_WHOLLY ROLLPACK_PRAGMA(unroll)
#endif

namespace rollpack::kernels::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr unsigned kWarp = 32;

}  // namespace rollpack::kernels::cuda

// Fragments of mma_bf16_m16n8k16, acc += A B with A [16, 16] bf16, B [16, 8] bf16, acc [16, 8] f32.
// Lane l of the warp, with g = l / 4 and t = l % 4, holds pairs of neighbours, the first in the low
// half of a register:
//   a[0] = A[g][2t, 2t+1]    a[1] = A[g+8][2t, 2t+1]    a[2] = A[g][2t+8, 2t+9]
//   a[3] = A[g+8][2t+8, 2t+9]
//   b[0] = B[2t, 2t+1][g]    b[1] = B[2t+8, 2t+9][g]
//   acc[0], acc[1] = acc[g][2t], acc[g][2t+1]    acc[2], acc[3] = acc[g+8][2t], acc[g+8][2t+1]
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
//
// ldmatrix_x4 loads four matrices of 8 rows of 16 bytes: lane l gives the address of row l % 8 of
// matrix l / 8 and gets, in r[i], elements 2t, 2t+1 of row g of matrix i; with _trans, the elements
// of rows 2t, 2t+1 in column g. Row addresses are multiples of 16.
//
// cp_async_16 copies 16 bytes, both addresses multiples of 16, or writes zeros where not `valid`
// (the global address is not read then). What was copied since the commit before belongs to one
// group; cp_async_wait<N>() returns when at most the last N groups of this thread are still under
// way. Other threads see the bytes after a barrier behind that wait.
#if defined(ROLLPACK_SIMT_EMULATION)
#include "kernels/cuda/emulation/simt_emulation.h"
#else
#include "kernels/cuda/simt_device.h"
#endif
