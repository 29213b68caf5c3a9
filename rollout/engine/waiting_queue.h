// Sequences that wait for admission, by arrival: what has waited longest comes first, and what was
// preempted takes its old place. Every operation is O(log n).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "rollout/engine/sequence.h"

namespace rollpack::rollout {

class WaitingQueue {
 public:
  using Map = std::map<uint64_t, std::unique_ptr<Sequence>>;

  bool empty() const { return by_arrival_.empty(); }
  size_t size() const { return by_arrival_.size(); }
  // Sequences with tokens drawn already: preempted, or dropped when weights changed.
  size_t num_started() const { return num_started_; }

  Map::iterator begin() { return by_arrival_.begin(); }
  Map::iterator end() { return by_arrival_.end(); }
  Map::const_iterator begin() const { return by_arrival_.begin(); }
  Map::const_iterator end() const { return by_arrival_.end(); }
  bool contains(uint64_t arrival) const { return by_arrival_.contains(arrival); }

  std::unique_ptr<Sequence>& front() { return by_arrival_.begin()->second; }
  void push(std::unique_ptr<Sequence> sequence) {
    num_started_ += sequence->has_started() ? 1 : 0;
    const uint64_t arrival = sequence->arrival;
    by_arrival_.emplace_hint(by_arrival_.end(), arrival, std::move(sequence));
  }
  // Takes one out.
  std::unique_ptr<Sequence> take(const Sequence& waiting) {
    const auto place = by_arrival_.find(waiting.arrival);
    std::unique_ptr<Sequence> sequence = std::move(place->second);
    num_started_ -= sequence->has_started() ? 1 : 0;
    by_arrival_.erase(place);
    return sequence;
  }

 private:
  Map by_arrival_;
  size_t num_started_ = 0;
};

}  // namespace rollpack::rollout
