// How many blocks and threads a kernel runs with, and on which stream. Plain data, so that code
// which is compiled once for the device and its emulation can hold it.
#pragma once

#include <cstdint>

namespace rollpack::kernels::cuda {

// Work on one stream runs in the order of its submission.
struct Stream {
  void* handle = nullptr;  // a cudaStream_t
};

// A point in a stream's work. Null in the emulation.
struct Event {
  void* handle = nullptr;  // a cudaEvent_t
};

// Work that was captured from a stream, to be enqueued again as a whole.
struct Graph {
  void* handle = nullptr;  // a cudaGraphExec_t
};

struct GridShape {
  uint32_t x = 1, y = 1, z = 1;
};

struct LaunchShape {
  const char* kernel = "";   // its name, for errors
  GridShape grid;            // blocks, at least 1 each way
  uint32_t block = 32;       // threads, a multiple of 32; blocks have one dimension
  int64_t shared_bytes = 0;  // what dynamic_shared() points at
};

}  // namespace rollpack::kernels::cuda
