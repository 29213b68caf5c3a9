// What the dispatcher writes down of requests, and what it goes on from after a restart.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "rollout/engine/request.h"
#include "trainer_bridge/contract/rollout_service.h"

namespace rollpack::rollout {

// A group as it was taken in.
struct AcceptedGroup {
  GroupRequest request;
  std::string origin;       // of an explicit prompt_id; empty: id by default
  bridge::Outcome skipped;  // why it is not generated at all
};

// What is left of an accepted group.
struct RestoredGroup {
  AcceptedGroup accepted;
  bool is_formed = false;     // its samples are those of a batch, and must be
  bool is_aborted = false;    // and in no batch yet: what is open comes empty
  std::vector<bool> is_done;  // [group_size] nothing is to be made
  // Samples of a batch that were aborted: response tokens to make, by sample_index.
  std::map<int32_t, int32_t> cut_lengths;
};

struct RestoredRequests {
  int64_t num_requests = 0;    // ever accepted: the next request_id
  int64_t weight_version = 0;  // the last that was current
  std::vector<RestoredGroup> groups;
};

class RequestLog {
 public:
  virtual ~RequestLog() = default;

  virtual void accepted(int64_t request_id, std::vector<AcceptedGroup> groups) = 0;
  // Of one request or of all that were accepted.
  virtual void aborted(std::optional<int64_t> request_id) = 0;
  virtual void switched(int64_t weight_version) = 0;
};

}  // namespace rollpack::rollout
