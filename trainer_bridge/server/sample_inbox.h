// Samples on their way from the engine's threads to the server's, and what must keep its place
// among them.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <utility>
#include <variant>
#include <vector>

#include "trainer_bridge/contract/sample.h"

namespace rollpack::bridge {

class SampleInbox {
 public:
  using Task = std::function<void()>;
  using Entry = std::variant<Sample, FailedSample, Task>;

  // True when the inbox was empty: whoever put the first one wakes the reader. Any thread.
  bool put(Entry entry) {
    const std::lock_guard lock(mutex_);
    entries_.push_back(std::move(entry));
    return entries_.size() == 1;
  }

  std::vector<Entry> take_all() {
    const std::lock_guard lock(mutex_);
    return std::exchange(entries_, {});
  }

  int64_t size() const {
    const std::lock_guard lock(mutex_);
    return static_cast<int64_t>(entries_.size());
  }

 private:
  mutable std::mutex mutex_;
  std::vector<Entry> entries_;
};

}  // namespace rollpack::bridge
