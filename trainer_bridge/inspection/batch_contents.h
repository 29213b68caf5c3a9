// What a batch holds, whatever its layout: samples, the rows they lie in, the tokens in the loss.
// Columns that say the same thing twice (lengths, positions, segments, masks) are held against each
// other, so that what is drawn is what a trainer computes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "trainer_bridge/inspection/batch_table.h"

namespace rollpack::bridge {

// Columns begin .. end of a row.
struct TokenRun {
  int64_t begin = 0;
  int64_t end = 0;

  bool operator==(const TokenRun&) const = default;
};

struct SampleContents {
  int64_t request_id = 0;
  int64_t prompt_index = 0;
  std::string prompt_id;  // bytes as they are in the batch
  int64_t sample_index = 0;
  int64_t begin = 0;  // column of its first token in its row
  int64_t num_prompt_tokens = 0;
  int64_t num_response_tokens = 0;
  uint8_t finish_reason = 0;
  // Of the response: versions of its first and last token (packed layout alone), mean of
  // rollout_log_probs over the tokens in the loss.
  std::optional<int64_t> first_version;
  std::optional<int64_t> last_version;
  std::optional<double> mean_logprob;

  int64_t num_tokens() const { return num_prompt_tokens + num_response_tokens; }
};

struct RowContents {
  int64_t first_sample = 0;
  int64_t num_samples = 0;
  int64_t width = 0;                // columns, pads included
  int64_t num_tokens = 0;           // without pads
  std::vector<TokenRun> loss_runs;  // in order, apart
};

struct BatchContents {
  bool is_packed = false;
  std::vector<SampleContents> samples;
  std::vector<RowContents> rows;  // padded: one a sample
  int64_t num_groups = 0;
  int64_t num_prompt_tokens = 0;
  int64_t num_response_tokens = 0;
  int64_t num_loss_tokens = 0;
  int64_t num_pads = 0;
  int64_t longest_prompt = 0;
  int64_t longest_response = 0;
  int64_t num_non_finite = 0;  // rollout_log_probs of tokens in the loss

  int64_t num_tokens() const { return num_prompt_tokens + num_response_tokens; }
  // Cells of the samples as rows of longest prompt + longest response.
  int64_t num_padded_cells() const {
    return static_cast<int64_t>(samples.size()) * (longest_prompt + longest_response);
  }
};

// Errors: data_loss naming the table's origin, the column, the entry and what another column says.
BatchContents read_batch_contents(const BatchTable& table);

}  // namespace rollpack::bridge
