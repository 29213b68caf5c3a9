// A stream of an emulated device: work that waits its turn. A device runs what is enqueued some
// time later, so a stream that defers runs it as late as it may: when it is waited for, or asked
// how far it is. What is overwritten or freed too early then shows as other numbers.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>

#include "kernels/cuda/launch_shape.h"

namespace rollpack::kernels::cuda::emulation {

class EmulatedStream {
 public:
  explicit EmulatedStream(bool defers) : defers_(defers) {}

  // Errors: where it is done at once, those of the work.
  void enqueue(std::function<void()> work);
  // How much was enqueued so far.
  int64_t num_enqueued();
  // Does all that was enqueued. Errors: those of the work, which counts as done then.
  void finish();
  // Whether so much is done; does one more where it is not. Errors: as above.
  bool has_done(int64_t count);

 private:
  void run_next();

  const bool defers_;
  std::recursive_mutex mutex_;  // one thread enqueues, any frees memory, for which all is done
  std::deque<std::function<void()>> pending_;
  int64_t num_done_ = 0;
};

// Enqueues work on a stream: records it where this thread captures (recording.h); does it at once
// on no stream at all.
void submit(Stream stream, const char* name, std::function<void()> work);

}  // namespace rollpack::kernels::cuda::emulation
