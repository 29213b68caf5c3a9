#include "kernels/cuda/emulation/recording.h"

#include <fmt/format.h>

#include <utility>

#include "kernels/base/error.h"

namespace rollpack::kernels::cuda::emulation {
namespace {

struct Capture {
  void* stream = nullptr;  // null: none
  Recording recording;
};

thread_local Capture capture;

}  // namespace

Recording* recording_of(Stream stream, const char* what) {
  if (capture.stream == nullptr) return nullptr;
  if (capture.stream != stream.handle) {
    fail_invariant(fmt::format("{} on a stream that is not the one being captured", what));
  }
  return &capture.recording;
}

void require_no_capture(const char* call) {
  if (capture.stream != nullptr) {
    fail_invariant(fmt::format("{} while a stream is being captured", call));
  }
}

void begin_recording(Stream stream) {
  require_no_capture("begin_capture");
  if (stream.handle == nullptr) fail_invariant("begin_capture of no stream");
  capture.stream = stream.handle;
}

Recording end_recording(Stream stream) {
  if (capture.stream == nullptr || capture.stream != stream.handle) {
    fail_invariant("the end of a capture of a stream that is not being captured");
  }
  return std::exchange(capture, {}).recording;
}

}  // namespace rollpack::kernels::cuda::emulation
