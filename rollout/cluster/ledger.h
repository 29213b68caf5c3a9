// Every accepted group from submit to its last committed sample: queued, running on a worker, done.
// Only the ledger decides whether a result counts, so that nothing is lost and nothing comes twice.
// Not thread-safe; the dispatcher guards it.
//
// A group is handed out under an attempt number. When its worker is lost the attempt is fenced: the
// group goes back to the queue with the samples that are still open, and what the old attempt may
// yet say is dropped. A group that was aboard when kDeathsOfSuspect workers died may be what kills
// them: it is a suspect, kept out of the queue and handed out by itself, and convicted at the
// kDeathsOfCulprit-th death.
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
  static constexpr int32_t kDeathsOfSuspect = 2;
  static constexpr int32_t kDeathsOfCulprit = 3;

  // The name of a group: its submit and its place in it.
  using GroupKey = std::pair<int64_t, int32_t>;

  // Whether groups accepted from now on go longest first, which shortens the tail of a submit, or
  // in the order they were submitted in, which is what modes that work in waves are defined over.
  void set_longest_first(bool longest_first) { longest_first_ = longest_first; }

  // Queues a group. `origin` names an explicit prompt_id's place for errors; empty: id by default.
  struct Taken {
    std::vector<bool>
        is_done;               // [group_size] samples that are not to be made, not all; empty: none
    bool must_finish = false;  // an abort does not end it
  };
  void accept(GroupRequest request, std::string origin) {
    accept(std::move(request), std::move(origin), {});
  }
  void accept(GroupRequest request, std::string origin, Taken taken);
  // Origin of the live group that carries this explicit prompt_id, if there is one.
  std::optional<std::string> live_origin(const std::string& prompt_id) const;

  // The queued group that a worker of `node` should run next: of the oldest submit the longest
  // expected, or the first (see set_longest_first); of what that node's bridge has asked for, if
  // there is any. nullopt: none is queued.
  std::optional<GroupKey> next(int32_t node) const;
  // The suspect to run next, on a worker that runs nothing else.
  std::optional<GroupKey> next_suspect() const;
  // Marks a queued group as running on `worker` under a new attempt and returns the request to
  // send, of its open samples.
  GroupRequest assign(const GroupKey& key, int32_t worker);
  int64_t expected_tokens(const GroupKey& key) const { return open_tokens(entries_.at(key)); }

  // Counts a sample that `worker` drew under `attempt` and returns the expected tokens that are off
  // its hands with it. nullopt: it is late, of a fenced attempt, unknown or a second one, and must
  // be dropped.
  std::optional<int64_t> commit(const bridge::SampleKey& key, int32_t worker, int32_t attempt);

  // As commit(), of a sample that `worker` hands back unfinished though its group must finish: once
  // the worker has nothing more of the group, what is open of it is queued again.
  // nullopt: it is none of those, and may be committed.
  std::optional<int64_t> give_back(const bridge::SampleKey& key, int32_t worker, int32_t attempt);

  // `worker` is lost: fences its attempts and queues their groups again. What is not queued is
  // taken out and returned, with its open samples: groups that were aborted before, and culprits.
  struct Fenced {
    int64_t num_requeued = 0;
    std::vector<GroupRequest> aborted;
    std::vector<GroupRequest> culprits;
  };
  // `blames`: it may have died of what it worked on.
  Fenced fence(int32_t worker, bool blames = true);

  // Takes queued groups out (of one submit, or all), for abort and shutdown, with their open
  // samples; those that run are not run again when their worker is lost.
  std::vector<GroupRequest> abort(std::optional<int64_t> request_id);
  // Takes out what no worker may run any more.
  std::vector<GroupRequest> take_suspects();

  // Requests of a node's bridge with open samples.
  std::vector<int64_t> open_requests(int32_t node) const;

  int64_t num_open_samples() const { return num_open_samples_; }
  int64_t num_open_samples(int64_t request_id) const;
  int64_t num_queued_groups() const {
    return num_in_queues_ + static_cast<int64_t>(suspects_.size());
  }
  int64_t num_queued_samples() const { return num_queued_samples_; }
  int64_t num_dropped() const { return num_dropped_; }

 private:
  struct Entry {
    GroupRequest request;
    std::string origin;
    int64_t precedence = 0;  // within its submit the largest goes first
    int32_t worker = -1;     // -1: queued
    int32_t attempt = 0;     // the last one handed out
    int32_t num_deaths = 0;  // of workers that ran it
    bool is_aborted = false;
    bool must_finish = false;
    int32_t num_left = 0;
    std::vector<bool> is_done;     // [group_size]
    std::set<int32_t> given_back;  // of num_left, by the worker
  };
  using Entries = std::map<GroupKey, Entry>;
  // (request, -precedence, prompt): oldest submit first.
  using QueueKey = std::tuple<int64_t, int64_t, int32_t>;

  static int64_t open_tokens(const Entry& entry);
  static GroupRequest open_request(const Entry& entry);
  void enqueue(const GroupKey& key, const Entry& entry);
  void dequeue(const GroupKey& key, const Entry& entry);
  Entries::iterator running(const bridge::SampleKey& key, int32_t worker, int32_t attempt);
  // Expected tokens that a worker is rid of with a sample, the prompt's with its last.
  int64_t settle(Entries::iterator entry, int32_t sample_index);
  void erase(Entries::iterator entry);
  // Forgets a group that is not running and returns its open samples.
  GroupRequest take(Entries::iterator entry);
  static QueueKey queue_key(const GroupKey& key, const Entry& entry) {
    return {key.first, -entry.precedence, key.second};
  }

  bool longest_first_ = true;
  Entries entries_;
  std::map<int32_t, std::set<QueueKey>> queues_;  // by the node that asked; none is empty
  int64_t num_in_queues_ = 0;
  std::set<GroupKey> suspects_;
  std::unordered_map<std::string, std::string> live_prompt_ids_;  // explicit ids -> origin
  int64_t num_open_samples_ = 0;
  int64_t num_queued_samples_ = 0;  // of groups in queues_ and suspects_
  int64_t num_dropped_ = 0;
};

}  // namespace rollpack::rollout
