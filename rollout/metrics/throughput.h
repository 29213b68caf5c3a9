// How fast a counter rises, over the last seconds.
#pragma once

#include <chrono>
#include <deque>
#include <utility>

namespace rollpack::rollout {

class Throughput {
 public:
  // Takes what the counter says at `time` and returns its rise a second over the last 5 s, or since
  // the first call. Calls come in order of time.
  double add(std::chrono::steady_clock::time_point time, double count) {
    points_.emplace_back(time, count);
    while (points_.size() > 2 && time - points_[1].first >= kWindow) points_.pop_front();
    const std::chrono::duration<double> span = time - points_.front().first;
    const double rise = count - points_.front().second;
    return span.count() > 0 && rise > 0 ? rise / span.count() : 0;
  }

 private:
  static constexpr std::chrono::seconds kWindow{5};

  std::deque<std::pair<std::chrono::steady_clock::time_point, double>> points_;
};

}  // namespace rollpack::rollout
