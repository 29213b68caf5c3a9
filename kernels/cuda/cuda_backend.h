// The backend that computes on a CUDA device.
#pragma once

#include <memory>

#include "kernels/backend.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/device_link.h"

namespace rollpack::kernels {

// Takes over `device`. Where several ranks hold the model all make theirs at once; `open_nccl` is
// for tests. Errors: unsupported for a model its kernels cannot run; resource_exhausted
// with the bytes needed; those of the device.
std::unique_ptr<Backend> make_cuda_backend(
    std::unique_ptr<cuda::Device> device, const ModelShape& shape, const BackendOptions& options,
    const cuda::OpenNccl& open_nccl = cuda::NcclLibrary::shared);

}  // namespace rollpack::kernels
