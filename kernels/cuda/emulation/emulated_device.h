// A device that is host memory and runs kernels in the emulation, at once and in order.
#pragma once

#include <memory>

#include "kernels/backend.h"
#include "kernels/cuda/device.h"

namespace rollpack::kernels::cuda {

struct EmulatedDeviceOptions {
  int64_t total_bytes = int64_t{1} << 40;  // memory that can be allocated
  int64_t max_shared_bytes = 99 * 1024;    // the least of what we build for: 8.6 and 8.9
  int32_t num_multiprocessors = 8;         // few, so that tests are cut as large steps are
};

std::unique_ptr<Device> make_emulated_device(const EmulatedDeviceOptions& options = {});

}  // namespace rollpack::kernels::cuda
