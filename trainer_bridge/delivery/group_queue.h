// Samples -> whole groups. A group is what one prompt of one submit asked for; it is finished when
// each of its samples has come or failed, and waits here, in order of finishing, for a batch.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "trainer_bridge/contract/sample.h"

namespace rollpack::bridge {

// Finished; samples and failures each by ascending sample_index.
struct Group {
  std::vector<Sample> samples;
  std::vector<FailedSample> failed;
};

class GroupQueue {
 public:
  // True when this one finished its group. A sample that came before under the same key is dropped
  // and counted: the first one wins.
  // Errors: internal for a key at odds with itself or its group.
  bool add(Sample sample);
  bool add(FailedSample sample);

  // Finished groups, the oldest first.
  std::deque<Group>& finished() { return finished_; }
  const std::deque<Group>& finished() const { return finished_; }
  // Takes the oldest.
  Group pop();

  int64_t num_open_groups() const { return static_cast<int64_t>(open_.size()); }
  // Samples and failures in open and finished groups.
  int64_t num_held_samples() const { return num_held_samples_; }
  int64_t num_duplicates() const { return num_duplicates_; }

 private:
  struct OpenGroup {
    Group group;
    std::vector<bool> has_sample;  // by sample_index
    int32_t num_missing = 0;
  };

  // The open group of `key` with its place marked; null for a duplicate.
  OpenGroup* claim(const SampleKey& key);
  bool close_if_whole(const SampleKey& key, OpenGroup& open);

  std::map<std::pair<int64_t, int32_t>, OpenGroup> open_;  // by request_id, prompt_index
  std::deque<Group> finished_;
  int64_t num_held_samples_ = 0;
  int64_t num_duplicates_ = 0;
};

}  // namespace rollpack::bridge
