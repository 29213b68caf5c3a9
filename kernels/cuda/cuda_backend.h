// The backend that computes on a CUDA device.
#pragma once

#include <memory>

#include "kernels/backend.h"
#include "kernels/cuda/device.h"

namespace rollpack::kernels {

// Takes over `device`. Errors: unsupported for a model its kernels cannot run; resource_exhausted
// with the bytes needed; those of the device.
std::unique_ptr<Backend> make_cuda_backend(std::unique_ptr<cuda::Device> device,
                                           const ModelShape& shape, const BackendOptions& options);

}  // namespace rollpack::kernels
