// Samples -> whole groups. A group is what one prompt of one submit asked for; it is finished when
// each of its samples has come or failed, and waits here for a batch.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "trainer_bridge/contract/sample.h"

namespace rollpack::bridge {

// Finished; samples and failures each by ascending sample_index.
struct Group {
  std::vector<Sample> samples;
  std::vector<FailedSample> failed;

  // Whether every sample of it came and ended by itself: none failed, none was aborted.
  bool is_complete() const;
};

enum class GroupOrder : uint8_t {
  kCompletion,  // as they finish
  kCanonical,   // by request, then by prompt index, each waiting for those before it
};

class GroupQueue {
 public:
  // A submit of `num_prompts` groups: canonical order waits for each from here on. A group that
  // nobody announced counts from its first sample.
  void expect(int64_t request_id, int64_t num_prompts);
  // One group alone, of a submit whose others were delivered before.
  void expect_group(int64_t request_id, int32_t prompt_index) {
    untaken_.emplace(request_id, prompt_index);
  }

  // True when this one finished its group. A sample that came before under the same key is dropped
  // and counted, as long as its group was not taken: the first one wins.
  // Errors: internal for a key at odds with itself or its group.
  bool add(Sample sample);
  bool add(FailedSample sample);

  // The group that finished last; there is one.
  Group& last_finished();
  // The groups that `order` hands out next, `limit` at most. Valid until the next add() or take().
  std::vector<Group*> ready(GroupOrder order, int64_t limit);
  // Takes the first `num_groups` of ready().
  std::vector<Group> take(GroupOrder order, int64_t num_groups);

  int64_t num_open_groups() const { return static_cast<int64_t>(open_.size()); }
  int64_t num_finished_groups() const { return static_cast<int64_t>(finished_.size()); }
  // Samples and failures in open and finished groups.
  int64_t num_held_samples() const { return num_held_samples_; }
  int64_t num_duplicates() const { return num_duplicates_; }

 private:
  using Key = std::pair<int64_t, int32_t>;  // request_id, prompt_index
  struct OpenGroup {
    Group group;
    std::vector<bool> has_sample;  // by sample_index
    int32_t num_missing = 0;
  };
  struct FinishedGroup {
    Group group;
    uint64_t finish_number = 0;
  };

  // The open group of `key` with its place marked; null for a duplicate.
  OpenGroup* claim(const SampleKey& key);
  bool close_if_whole(const SampleKey& key, OpenGroup& open);
  std::vector<Key> ready_keys(GroupOrder order, int64_t limit) const;

  std::map<Key, OpenGroup> open_;
  std::map<Key, FinishedGroup> finished_;
  std::map<uint64_t, Key> by_finish_;  // finish_number -> key in finished_
  std::set<Key> untaken_;              // expected, open or finished
  uint64_t num_closed_ = 0;
  int64_t num_held_samples_ = 0;
  int64_t num_duplicates_ = 0;
};

}  // namespace rollpack::bridge
