// What of a journal still counts: accepted groups with a sample that is not acknowledged, batches
// that are not released, and the numbers given out. The one place that knows what a record means;
// reading a journal, going on with one and rewriting one all go through apply().
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "rollout/journal/record.h"

namespace rollpack::rollout {

class LiveSet {
 public:
  // Errors: data_loss for a record that contradicts those before it; nothing is changed then.
  void apply(Record record);

  // The fewest records, less the header, that make the same set.
  std::vector<Record> records() const;
  // About what records() takes in a file.
  int64_t num_bytes() const { return num_bytes_; }

  RestoredRequests requests() const;
  // Of a node's bridge.
  bridge::RestoredDelivery delivery(int32_t node = 0) const;
  // The highest one whose bridge has something left.
  int32_t last_node() const;

  // Numbers of batches and steps that are not given out again, in case what was lost with a damaged
  // journal had them: a client's state may name those as consumed.
  void skip_numbers(int64_t count);

  const record::Counters& counters() const { return counters_; }
  int64_t num_groups() const { return static_cast<int64_t>(groups_.size()); }
  int64_t num_batches() const { return static_cast<int64_t>(batches_.size()); }

 private:
  using GroupKey = std::pair<int64_t, int32_t>;  // request_id, prompt_index
  enum class SampleState : uint8_t { kOpen, kFormed, kFailed, kReleased };
  struct Group {
    record::Group record;
    std::vector<SampleState> states;  // [group_size]
    int32_t num_left = 0;             // not released
    std::map<int32_t, int32_t> cut_lengths;
    int64_t num_bytes = 0;

    bool is_formed() const;
    int32_t node() const { return record.accepted.request.key.node; }
  };
  struct Batch {
    bridge::FormedBatch record;
    int64_t num_bytes = 0;
  };

  void apply_one(record::Header&);
  void apply_one(record::Counters& counters);
  void apply_one(record::Accepted& accepted);
  void apply_one(record::Aborted& aborted);
  void apply_one(record::Formed& formed);
  void apply_one(record::Released& released);
  void apply_one(record::Switched& switched);
  void apply_one(record::NodeAccepted& accepted);
  void apply_one(record::NodeCounters& counters);
  void count(int32_t node, uint64_t batch_seq, uint64_t step);
  void check(const record::Formed& formed) const;
  void form(bridge::FormedBatch batch);
  void release_sample(int64_t request_id, int32_t prompt_index, int32_t sample_index);

  std::map<GroupKey, Group> groups_;
  std::map<uint64_t, Batch> batches_;  // by batch_seq, with the node
  record::Counters counters_;
  std::map<int32_t, record::NodeCounters> node_counters_;
  int64_t num_bytes_ = 0;
};

}  // namespace rollpack::rollout
