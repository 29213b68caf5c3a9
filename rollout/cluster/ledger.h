// Every accepted group from submit to its last committed sample: queued, running on a worker, done.
// Only the ledger decides whether a result counts, so that nothing is lost and nothing comes twice.
// Not thread-safe; the dispatcher guards it.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "rollout/engine/request.h"

namespace rollpack::rollout {

class Ledger {
 public:
  // The name of a group: its submit and its place in it.
  using GroupKey = std::pair<int64_t, int32_t>;

  // Whether groups accepted from now on go longest first, which shortens the tail of a submit, or
  // in the order they were submitted in, which is what modes that work in waves are defined over.
  void set_longest_first(bool longest_first) { longest_first_ = longest_first; }

  // Queues a group. `origin` names an explicit prompt_id's place for errors; empty: id by default.
  void accept(GroupRequest request, std::string origin);
  // Origin of the live group that carries this explicit prompt_id, if there is one.
  std::optional<std::string> live_origin(const std::string& prompt_id) const;

  // The queued group to run next: of the oldest submit the longest expected, or the first
  // (see set_longest_first). nullopt: none is queued.
  std::optional<GroupKey> next() const;
  // Marks a queued group as running on `worker` and returns the request to send.
  GroupRequest assign(const GroupKey& key, int32_t worker);
  int64_t expected_tokens(const GroupKey& key) const { return entries_.at(key).expected_tokens; }

  // Counts a sample of `worker` and returns the expected tokens that are off its hands with it.
  // nullopt: it is late, unknown or a second one, and must be dropped.
  std::optional<int64_t> commit(const bridge::SampleKey& key, int32_t worker);

  // Takes queued groups out (of one submit, or all), for abort and shutdown.
  std::vector<GroupRequest> take_queued(std::optional<int64_t> request_id);

  int64_t num_open_samples() const { return num_open_samples_; }
  int64_t num_open_samples(int64_t request_id) const;
  int64_t num_queued_groups() const { return static_cast<int64_t>(queue_.size()); }
  int64_t num_dropped() const { return num_dropped_; }

 private:
  struct Entry {
    GroupRequest request;
    std::string origin;
    int64_t expected_tokens = 0;
    int64_t precedence = 0;  // within its submit the largest goes first
    int32_t worker = -1;     // -1: queued
    int32_t num_left = 0;
    std::vector<bool> is_done;  // [group_size]
  };
  // (request, -precedence, prompt): oldest submit first.
  using QueueKey = std::tuple<int64_t, int64_t, int32_t>;

  void erase(std::map<GroupKey, Entry>::iterator entry);
  static QueueKey queue_key(const GroupKey& key, const Entry& entry) {
    return {key.first, -entry.precedence, key.second};
  }

  bool longest_first_ = true;
  std::map<GroupKey, Entry> entries_;
  std::set<QueueKey> queue_;
  std::unordered_map<std::string, std::string> live_prompt_ids_;  // explicit ids -> origin
  int64_t num_open_samples_ = 0;
  int64_t num_dropped_ = 0;
};

}  // namespace rollpack::rollout
