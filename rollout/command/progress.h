// A progress line on standard error, shown only where that is a terminal.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace rollpack::rollout {

class Progress {
 public:
  // `unit` is what is counted, e.g. "samples".
  Progress(std::string unit, int64_t total);
  ~Progress();  // ends the line

  void show(int64_t done);  // at most ten times a second

 private:
  const std::string unit_;
  const int64_t total_;
  const bool is_shown_;
  std::chrono::steady_clock::time_point next_;
};

}  // namespace rollpack::rollout
