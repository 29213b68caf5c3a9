// What delivery writes down so that batches outlive the process: which samples a batch holds,
// before a client hears of it, and its release, before the release is confirmed. Implemented by
// rollout's journal; without one nothing is written and everything is durable at once.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "trainer_bridge/contract/sample.h"

namespace rollpack::bridge {

// A sample of a batch, by name.
struct FormedSample {
  int64_t request_id = 0;
  int32_t prompt_index = 0;
  int32_t sample_index = 0;
  int32_t num_tokens = -1;  // of a partial sample, which was aborted there; -1: it ended by itself

  bool operator==(const FormedSample&) const = default;
};

// All that makes a batch the same batch again, but for the samples' tokens, which are made anew.
struct FormedBatch {
  uint64_t batch_seq = 0;
  int64_t num_groups = 0;
  int64_t num_complete_groups = 0;
  // A share of a step that was split for data-parallel ranks.
  uint64_t step = 0;     // 0: not split
  int32_t dp_rank = -1;  // -1: not split
  int32_t dp_size = 1;
  bool keeps_groups_whole = false;
  bool needs_slot = true;           // false: failures alone
  std::vector<int32_t> row_starts;  // [M + 1] where split, else empty
  std::vector<FormedSample> samples;
  std::vector<FailedSample> failed;
};

// Groups of a request that are in no batch yet.
struct UnformedGroups {
  int64_t request_id = 0;
  std::vector<int32_t> prompt_indices;
};

// What delivery goes on from after a restart.
struct RestoredDelivery {
  std::string instance;  // what the lives of one journal share, as a client's state names it
  uint64_t last_batch_seq = 0;
  uint64_t num_steps = 0;
  std::vector<FormedBatch> batches;  // not released, by batch_seq
  std::vector<UnformedGroups> unformed;
};

class DeliveryLog {
 public:
  virtual ~DeliveryLog() = default;

  // All of them or none outlive the process.
  virtual void formed(std::vector<FormedBatch> batches) = 0;
  virtual void released(uint64_t batch_seq) = 0;
  // Calls `done` once everything written down so far, by whomever, is on disk; with an error where
  // it cannot be. On any thread, at once where nothing is under way.
  virtual void when_durable(std::function<void(std::optional<ErrorInfo>)> done) = 0;
};

}  // namespace rollpack::bridge
