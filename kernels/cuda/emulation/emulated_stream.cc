#include "kernels/cuda/emulation/emulated_stream.h"

#include <utility>

#include "kernels/cuda/emulation/recording.h"

namespace rollpack::kernels::cuda::emulation {

void EmulatedStream::enqueue(std::function<void()> work) {
  const std::lock_guard lock(mutex_);
  pending_.push_back(std::move(work));
  if (!defers_) run_next();
}

int64_t EmulatedStream::num_enqueued() {
  const std::lock_guard lock(mutex_);
  return num_done_ + static_cast<int64_t>(pending_.size());
}

void EmulatedStream::finish() {
  const std::lock_guard lock(mutex_);
  while (!pending_.empty()) run_next();
}

bool EmulatedStream::has_done(int64_t count) {
  const std::lock_guard lock(mutex_);
  if (num_done_ < count && !pending_.empty()) run_next();
  return num_done_ >= count;
}

void EmulatedStream::run_next() {
  const std::function<void()> work = std::move(pending_.front());
  pending_.pop_front();
  ++num_done_;
  work();
}

void submit(Stream stream, const char* name, std::function<void()> work) {
  if (Recording* recording = recording_of(stream, name)) {
    recording->push_back({name, std::move(work)});
  } else if (stream.handle == nullptr) {
    work();
  } else {
    static_cast<EmulatedStream*>(stream.handle)->enqueue(std::move(work));
  }
}

}  // namespace rollpack::kernels::cuda::emulation
