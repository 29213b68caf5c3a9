// Samples -> the bytes of one batch, as contract/batch_schema.h frames them. A layout is a list of
// columns; sizes, offsets, header and checksum follow from that list, here, for every layout alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "trainer_bridge/contract/sample.h"

namespace rollpack::bridge {

struct Column;

struct LayoutOptions {
  std::string layout = "packed";       // "packed" or "padded"
  int32_t max_tokens_per_row = 16384;  // of the packed layout
  // Of the padded layout: columns of prompts and of responses, 0 for the longest of the batch, and
  // what such a longest is rounded up to a multiple of.
  int32_t prompt_width = 0;
  int32_t response_width = 0;
  int32_t pad_to_multiple_of = 1;
  std::vector<std::string> columns;  // logprobs, scaled_logprobs, .. ; see sample_columns
  int32_t pad_token_id = 0;          // written into pads, never read
  std::string logprobs_mode = "processed_logprobs";  // what rollout_log_probs holds
};

// Errors: invalid_argument naming bridge.layout, bridge.max_tokens_per_row, bridge.prompt_width,
// bridge.response_width, bridge.pad_to_multiple_of, bridge.columns[i], rollout.logprobs_mode or
// pad_token_id.
void check_layout_options(const LayoutOptions& options);

// Immutable, so any thread may use it. Samples are borrowed for the length of a call.
class BatchLayout {
 public:
  explicit BatchLayout(LayoutOptions options) : options_(std::move(options)) {}
  virtual ~BatchLayout() = default;
  BatchLayout(const BatchLayout&) = delete;
  BatchLayout& operator=(const BatchLayout&) = delete;

  // Most tokens of a row; 0 where a row is one sample.
  virtual int64_t max_tokens_per_row() const = 0;
  // Entries of input_ids for these samples: their tokens, and the pads among them.
  // Errors: as write() where no width holds them.
  virtual int64_t num_places(std::span<const Sample* const> samples) const = 0;

  // Exactly the bytes that write() fills for the same arguments.
  // Errors: as write(), but for the slot's size.
  int64_t batch_bytes(std::span<const Sample* const> samples,
                      std::span<const int32_t> row_starts = {}) const;

  // Writes header, column table and columns to the start of `slot` (aligned to 64 bytes) and
  // returns their bytes; what lies behind them is left alone. The same samples in the same order
  // give the same bytes.
  //   crc32       out, zlib's, of all bytes after the header; also in the header
  //   row_starts  [M + 1], from 0 to the number of samples, not decreasing: the rows, where the
  //               caller has decided them; empty: the layout decides. Ignored where a row is one
  //               sample
  // Errors: invalid_argument naming the sample that no row can hold, and bridge.max_tokens_per_row,
  // bridge.prompt_width or bridge.response_width;
  // failed_precondition naming bridge.columns where a sample lacks its entropy; resource_exhausted
  // naming bridge.slot_bytes; unsupported where an offset or version leaves i32; internal for a
  // sample at odds with itself.
  int64_t write(std::span<const Sample* const> samples, uint64_t batch_seq, uint64_t generation,
                std::span<std::byte> slot, uint32_t& crc32,
                std::span<const int32_t> row_starts = {}) const;

 protected:
  // The columns of a batch of these (already checked) samples, in the order of the table. They may
  // refer to the samples, which outlive them.
  virtual std::vector<Column> columns(std::span<const Sample* const> samples,
                                      std::span<const int32_t> row_starts) const = 0;

  const LayoutOptions& options() const { return options_; }

 private:
  std::vector<Column> checked_columns(std::span<const Sample* const> samples,
                                      std::span<const int32_t> row_starts) const;

  LayoutOptions options_;
};

// Errors: as check_layout_options().
std::unique_ptr<BatchLayout> make_layout(const LayoutOptions& options);

}  // namespace rollpack::bridge
