// Work of a captured stream on the host: recorded with its arguments, and run as often as the graph
// is launched. What CUDA forbids while a stream is captured is an error here.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "kernels/cuda/launch_shape.h"

namespace rollpack::kernels::cuda::emulation {

struct RecordedWork {
  std::string name;  // of the kernel, "copy" or "clear"
  std::function<void()> run;
};

using Recording = std::vector<RecordedWork>;

// The recording that work on `stream` belongs to; null: it is done at once. A capture is the
// calling thread's.
// Errors: internal naming `what` where this thread captures another stream.
Recording* recording_of(Stream stream, const char* what);
// Errors: internal naming `call` where this thread captures a stream.
void require_no_capture(const char* call);

// Errors of both: internal where the stream is captured already, or is not.
void begin_recording(Stream stream);
Recording end_recording(Stream stream);

}  // namespace rollpack::kernels::cuda::emulation
