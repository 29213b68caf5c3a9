// Data-parallel trainers: which client is which rank, and the shares of steps that were split for
// them and wait for their rank to ask.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <vector>

#include "trainer_bridge/contract/sample.h"
#include "trainer_bridge/delivery/group_queue.h"
#include "trainer_bridge/layout/batch_layout.h"

namespace rollpack::bridge {

// What a client says of itself in hello.
struct DpMember {
  int32_t rank = 0;
  int32_t size = 1;
  bool keeps_groups_whole = false;
};

// One rank's part of a step.
struct Share {
  uint64_t step = 0;       // from 1
  uint64_t batch_seq = 0;  // 0: none until it is sent
  int32_t rank = 0;
  std::vector<Sample> samples;       // row by row
  std::vector<int32_t> row_starts;   // [M + 1]; M is the same for all ranks of the step
  std::vector<FailedSample> failed;  // each with the first sample of its group, else with rank 0
  int64_t num_groups = 0;            // of the step
  int64_t num_complete_groups = 0;
  bool needs_slot = false;  // some rank of the step has samples
};

// How groups are shared out, before anything is moved.
struct SharePlan {
  std::vector<Sample*> samples;
  std::vector<int32_t> row_starts;
};

// Shares for `member.size` ranks, by packing/dp_plan.h.
std::vector<SharePlan> plan_shares(const std::vector<Group*>& groups, const DpMember& member,
                                   int64_t max_tokens_per_row, int64_t parity_tokens);

class DpRanks {
 public:
  // Errors: failed_precondition naming dp_size or whole_groups where other clients are ranks of
  // another split, or where shares of another split are not acknowledged: `num_held` in slots
  // besides those here.
  void join(uint64_t client, const DpMember& member, int64_t num_held);
  void leave(uint64_t client) { members_.erase(client); }
  const DpMember* member(uint64_t client) const;

  // Whether `client` may have what was split for `rank`: its ranks, and where no client is one,
  // everybody who is none.
  bool may_have(uint64_t client, int32_t rank) const;
  // The oldest share that `client` may have; it stays until pop().
  const Share* next_share(uint64_t client) const;
  Share pop(const Share& share);

  // Splits `groups` for the ranks of `member`; returns the shares, which stay here.
  std::vector<Share*> put_step(std::vector<Group> groups, const DpMember& member,
                               int64_t max_tokens_per_row, int64_t parity_tokens);

  // Goes on from a split that others made, of so many steps.
  void restore(const DpMember& split, uint64_t num_steps);

  int64_t num_shares() const;
  int64_t num_held_samples() const { return num_held_samples_; }
  uint64_t num_steps() const { return num_steps_; }

 private:
  std::map<uint64_t, DpMember> members_;         // by client
  std::map<int32_t, std::deque<Share>> shares_;  // by rank, the oldest first
  DpMember split_;                               // of the latest steps; rank means nothing
  uint64_t num_steps_ = 0;
  int64_t num_held_samples_ = 0;
};

}  // namespace rollpack::bridge
