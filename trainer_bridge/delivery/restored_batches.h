// Batches that were formed in a life before this one and not released: which samples they wait for,
// and what has come. Each is delivered as the same batch again: the same samples in the same order
// under the same batch_seq.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <tuple>
#include <vector>

#include "trainer_bridge/contract/delivery_log.h"
#include "trainer_bridge/contract/sample.h"

namespace rollpack::bridge {

class RestoredBatches {
 public:
  struct Batch {
    FormedBatch record;           // failed: also those that failed when they were made anew
    std::vector<Sample> samples;  // in the record's order, once it is whole
    int64_t num_missing = 0;
  };

  void add(FormedBatch record);

  // True when a batch waits for it (it is moved from then).
  bool take(Sample& sample);
  bool take(FailedSample& sample);

  // The one of least batch_seq among those that `is_wanted`; null: there is none.
  const Batch* first(const std::function<bool(const FormedBatch&)>& is_wanted) const;
  // Whole only. What failed is out of its rows.
  Batch pop(uint64_t batch_seq);

  int64_t num_batches() const { return static_cast<int64_t>(batches_.size()); }
  int64_t num_shares() const;  // of those, of steps split for data-parallel ranks
  int64_t num_held_samples() const { return num_held_samples_; }

 private:
  using Name = std::tuple<int64_t, int32_t, int32_t>;
  struct Place {
    uint64_t batch_seq = 0;
    size_t index = 0;  // in the record's samples
  };
  std::optional<Place> claim(const SampleKey& key);

  std::map<uint64_t, Batch> batches_;  // by batch_seq; places of what is missing are empty
  std::map<Name, Place> awaited_;
  int64_t num_held_samples_ = 0;
};

}  // namespace rollpack::bridge
