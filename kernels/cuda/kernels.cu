// The kernel set of the compiler that compiles this file.
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/simt.h"

namespace rollpack::kernels::cuda {
inline namespace ROLLPACK_SIMT {

const KernelSet& kernel_set() {
  static constexpr KernelSet kSet = {.begin_step = begin_step,
                                     .embed = embed,
                                     .rms_norm = rms_norm,
                                     .linear = linear,
                                     .rope_append = rope_append,
                                     .attention = attention,
                                     .gather_rows = gather_rows,
                                     .lm_head = lm_head,
                                     .move_columns = move_columns};
  return kSet;
}

}  // namespace ROLLPACK_SIMT

#ifndef ROLLPACK_SIMT_EMULATION

const KernelSet& compiled_kernel_set() {
  return kernel_set();
}

namespace {
__global__ void probe() {}
}  // namespace

// A cudaError_t: whether some image of this program runs on the current device.
int probe_image() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe));
}

#endif

}  // namespace rollpack::kernels::cuda
