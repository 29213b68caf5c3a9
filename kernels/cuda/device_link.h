// Which way ranks that hold one model together exchange what their devices compute: by NCCL where
// every rank has it and a device of its own, else through host memory. No bit depends on it.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/cuda/device_communicator.h"
#include "kernels/cuda/nccl_library.h"

namespace rollpack::kernels::cuda {

// Errors: those of NcclLibrary.
using OpenNccl = std::function<std::shared_ptr<const NcclLibrary>()>;

// What one rank makes and all are given, so that their devices find each other. Errors: those of
// `open`; unavailable.
std::vector<std::byte> make_nccl_link(const OpenNccl& open = NcclLibrary::shared);

// Called by all ranks at once, unless `link` is empty: through host memory then. All of them come
// to the same. Errors: unavailable naming who is missing, or what NCCL says.
std::unique_ptr<DeviceCommunicator> link_devices(Device& device, Stream stream,
                                                 std::shared_ptr<Communicator> host,
                                                 std::span<const std::byte> link,
                                                 const OpenNccl& open = NcclLibrary::shared);

}  // namespace rollpack::kernels::cuda
