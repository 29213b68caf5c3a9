// A CUDA device, over the CUDA runtime, which is linked statically and opens the driver when it is
// first called: a program with this in it starts on a host without one.
#pragma once

#include <memory>
#include <string>

#include "kernels/cuda/device.h"

namespace rollpack::kernels::cuda {

// Why no device can be used here, naming device, compute capability, driver and built images as far
// as they are known; empty where one can. Starts no context.
std::string why_no_device();

// Of the devices that the process may see (CUDA_VISIBLE_DEVICES) the one of this rank; see
// choose_device(). Errors: unsupported with the text of why_no_device(); those of choose_device()
// and of CUDA.
std::unique_ptr<Device> make_cudart_device(int rank_on_node);

// Fails as every call here does, with the runtime's words for `error`, a cudaError_t.
[[noreturn]] void fail_call(int error, std::string call, std::string value = {});

}  // namespace rollpack::kernels::cuda
