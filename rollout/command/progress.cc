#include "rollout/command/progress.h"

#include <unistd.h>

#include <cstdio>
#include <utility>

#include <fmt/format.h>

namespace rollpack::rollout {

Progress::Progress(std::string unit, int64_t total)
    : unit_(std::move(unit)), total_(total), is_shown_(::isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() {
  if (is_shown_) fmt::print(stderr, "\n");
}

void Progress::show(int64_t done) {
  const auto now = std::chrono::steady_clock::now();
  if (!is_shown_ || (now < next_ && done < total_)) return;
  next_ = now + std::chrono::milliseconds(100);
  fmt::print(stderr, "\r{} of {} {}", done, total_, unit_);
  std::fflush(stderr);
}

}  // namespace rollpack::rollout
