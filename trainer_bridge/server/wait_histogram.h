// How long next_batch calls waited for the batch they got, counted by powers of about three.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace rollpack::bridge {

class WaitHistogram {
 public:
  // Upper bounds, seconds, each included; one more bucket takes what is longer.
  static constexpr std::array<double, 11> kBoundsS = {0.001, 0.003, 0.01, 0.03, 0.1, 0.3,
                                                      1,     3,     10,   30,   100};

  void add(std::chrono::duration<double> wait) {
    const auto bound = std::ranges::lower_bound(kBoundsS, wait.count());
    ++counts[static_cast<size_t>(bound - kBoundsS.begin())];
    sum_s += wait.count();
  }

  std::array<int64_t, kBoundsS.size() + 1> counts = {};  // by bucket, not cumulative
  double sum_s = 0;
};

}  // namespace rollpack::bridge
