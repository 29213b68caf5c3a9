// Work as an engine takes it: whole groups, and sequences to score.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "rollout/sampling/request_sampling.h"
#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/contract/sample.h"

namespace rollpack::rollout {

inline constexpr int32_t kMaxGroupSize = 65536;

// One prompt and the samples to draw for it. key.sample_index is unused.
struct GroupRequest {
  bridge::SampleKey key;
  int32_t attempt = 0;  // counts, from 1, how often the group was handed to a worker
  // Ascending; empty: all of the group. Others were drawn before a worker was lost.
  std::vector<int32_t> sample_indices;
  std::shared_ptr<const std::vector<int32_t>> prompt_ids;
  RequestSampling sampling;
  // Longest responses, one a sample; empty: sampling.response_length.
  std::vector<int32_t> response_lengths;
  bool ignores_stops = false;  // a benchmark's: response_lengths are reached

  int32_t num_samples() const {
    return sample_indices.empty() ? key.group_size : static_cast<int32_t>(sample_indices.size());
  }
  int32_t sample_index(int32_t i) const { return sample_indices.empty() ? i : sample_indices[i]; }
  int32_t response_limit(int32_t sample_index) const {
    return response_lengths.empty() ? sampling.response_length : response_lengths[sample_index];
  }
};

struct ScoreRequest {
  uint64_t ticket = 0;  // echoed with the result
  bridge::ScoreSequence sequence;
};

}  // namespace rollpack::rollout
