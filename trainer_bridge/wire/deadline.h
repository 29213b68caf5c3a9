// Until when a call may wait.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace rollpack::bridge {

using Deadline = std::chrono::steady_clock::time_point;

// What poll(2) may wait: whole milliseconds, rounded up so that it does not spin in the last one; 0
// once the deadline has passed.
inline int milliseconds_until(Deadline deadline) {
  const auto left =
      std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
  return static_cast<int>(std::clamp<int64_t>(left.count(), 0, 1 << 30));
}

}  // namespace rollpack::bridge
