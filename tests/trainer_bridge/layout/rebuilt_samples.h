// From a read batch back to samples, by either layout's own rules, and their comparison with what
// went in.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "tests/trainer_bridge/layout/batch_reader.h"
#include "trainer_bridge/contract/sample.h"

namespace rollpack::bridge::testing {

struct RebuiltSample {
  int64_t request_id = 0;
  int32_t prompt_index = 0;
  std::string prompt_id;
  int32_t sample_index = 0;
  int32_t group_size = 0;
  std::vector<int32_t> prompt_ids;
  std::vector<int32_t> response_ids;
  std::map<std::string, std::vector<float>> values;  // by column, one a response token
  std::vector<int32_t> weight_versions;              // of the packed layout
  uint8_t finish_reason = 255;
  int32_t stop_token_id = 0;
  float temperature = 0;
};

// The f32 columns aligned with tokens that the batch has.
std::vector<std::string> value_columns(const ReadBatch& batch);

// Samples in batch order. Both also check, with EXPECT, everything that a batch says twice: masks,
// positions, segment numbers, fills, pads.
std::vector<RebuiltSample> rebuild_packed(const ReadBatch& batch);
std::vector<RebuiltSample> rebuild_padded(const ReadBatch& batch, int64_t pad_id);

// Compares all that `rebuilt` holds, bit for bit; rollout_log_probs against `rollout_log_probs`.
void expect_same(const RebuiltSample& rebuilt, const Sample& sample,
                 const std::vector<float>& rollout_log_probs);

}  // namespace rollpack::bridge::testing
