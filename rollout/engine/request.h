// Work as an engine takes it: whole groups, and sequences to score.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "rollout/sampling/request_sampling.h"
#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/contract/sample.h"

namespace rollpack::rollout {

// One prompt and the samples to draw for it. key.sample_index is unused.
struct GroupRequest {
  bridge::SampleKey key;
  std::shared_ptr<const std::vector<int32_t>> prompt_ids;
  RequestSampling sampling;
  // Fixed lengths of a benchmark, one a sample, stops ignored; empty: sampling.response_length.
  std::vector<int32_t> response_lengths;

  int32_t response_limit(int32_t sample_index) const {
    return response_lengths.empty() ? sampling.response_length : response_lengths[sample_index];
  }
};

struct ScoreRequest {
  uint64_t ticket = 0;  // echoed with the result
  bridge::ScoreSequence sequence;
};

}  // namespace rollpack::rollout
