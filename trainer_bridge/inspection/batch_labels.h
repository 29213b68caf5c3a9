// The words that both drawings of a batch use.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "trainer_bridge/inspection/batch_contents.h"
#include "trainer_bridge/inspection/batch_table.h"

namespace rollpack::bridge {

struct DrawingOptions {
  std::vector<int64_t> rows;  // which to draw; empty: the first `limit`
  int64_t limit = 8;
  int64_t width = 80;  // characters a line, of the text
};

// The rows to draw, by number.
// Errors: invalid_argument naming --row for one that the batch does not have.
std::vector<int64_t> drawn_rows(const BatchContents& contents, const DrawingOptions& options);

// What the batch is and how much it holds, a line each; `state` says where it lies, empty for a
// file.
std::vector<std::string> summary_lines(const BatchTable& table, const BatchContents& contents,
                                       const std::string& state);

// "stop", "length" or "abort".
std::string_view finish_name(uint8_t finish_reason);

// Text from outside, at most `max_bytes` of it: what is not UTF-8 or would steer a terminal becomes
// '?'.
std::string printable(std::string_view text, size_t max_bytes);

}  // namespace rollpack::bridge
