// A device that is host memory and runs kernels in the emulation, in order.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/device.h"

namespace rollpack::kernels::cuda {

// What tests want to know of a device that a backend has taken over.
struct EmulatedDeviceLog {
  // Names of the kernels and copies of every graph, in the order of their captures.
  std::vector<std::vector<std::string>> graphs;
  int64_t num_graph_launches = 0;
  // Memory in use by what it is for, as alloc() and reserve() were told.
  struct Memory {
    std::byte* data = nullptr;
    int64_t bytes = 0;
  };
  std::multimap<std::string, Memory> memory;
};

struct EmulatedDeviceOptions {
  int64_t total_bytes = int64_t{1} << 40;  // memory that can be allocated
  int64_t max_shared_bytes = 99 * 1024;    // the least of what we build for: 8.6 and 8.9
  int32_t num_multiprocessors = 8;         // few, so that tests are cut as large steps are
  int64_t graph_work_bytes = 1024;         // of a kernel or copy in a graph
  // Whether work is done when it is waited for and not when it is enqueued, as late as it may be.
  bool defers = false;
  int32_t number = -1;                     // devices of one number are one; -1: of its own
  std::shared_ptr<EmulatedDeviceLog> log;  // written where there is one
};

std::unique_ptr<Device> make_emulated_device(const EmulatedDeviceOptions& options = {});

}  // namespace rollpack::kernels::cuda
