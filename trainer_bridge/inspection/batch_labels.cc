#include "trainer_bridge/inspection/batch_labels.h"

#include <fmt/format.h>

#include <array>
#include <numeric>

#include "kernels/base/error.h"
#include "trainer_bridge/wire/utf8.h"

namespace rollpack::bridge {
namespace {

double percent(int64_t part, int64_t whole) {
  return whole == 0 ? 0.0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
}

std::string pads_line(const BatchContents& contents) {
  const int64_t cells = contents.num_padded_cells();
  const int64_t avoided = cells - contents.num_tokens();
  const std::string grid = fmt::format("[{}, {} + {}]", contents.samples.size(),
                                       contents.longest_prompt, contents.longest_response);
  if (contents.is_packed) {
    return fmt::format("pads: none; {} avoided of {} cells, laid out as {} ({:.1f}%)", avoided,
                       cells, grid, percent(avoided, cells));
  }
  return fmt::format("pads: {} of {} cells ({:.1f}%); packed they were none", contents.num_pads,
                     contents.num_pads + contents.num_tokens(),
                     percent(contents.num_pads, contents.num_pads + contents.num_tokens()));
}

// C1 controls are two bytes in UTF-8, U+FFFE and U+FFFF three; XML has no place for the latter.
bool is_forbidden(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<uint8_t>(text[i]) : 0; };
  if (byte(at) < 0x20 || byte(at) == 0x7f) return true;
  if (byte(at) == 0xc2 && byte(at + 1) < 0xa0) return true;
  return byte(at) == 0xef && byte(at + 1) == 0xbf && byte(at + 2) >= 0xbe;
}

}  // namespace

std::vector<int64_t> drawn_rows(const BatchContents& contents, const DrawingOptions& options) {
  const auto num_rows = static_cast<int64_t>(contents.rows.size());
  for (const int64_t row : options.rows) {
    if (row >= 0 && row < num_rows) continue;
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "--row",
                 .value = std::to_string(row),
                 .allowed = num_rows == 0 ? "none: the batch has no rows"
                                          : fmt::format("0 to {}", num_rows - 1)});
  }
  if (!options.rows.empty()) return options.rows;
  std::vector<int64_t> rows(static_cast<size_t>(std::min(num_rows, options.limit)));
  std::iota(rows.begin(), rows.end(), int64_t{0});
  return rows;
}

std::vector<std::string> summary_lines(const BatchTable& table, const BatchContents& contents,
                                       const std::string& state) {
  const BatchHeader& header = table.header;
  std::vector<std::string> lines = {
      fmt::format("{}{}{}", printable(table.origin, 200), state.empty() ? "" : ": ", state),
      fmt::format("batch {}, generation {}: {} bytes, {} columns, crc32 {:#010x} fits",
                  header.batch_seq, header.generation, header.bytes, header.num_columns,
                  header.crc32),
      fmt::format("{}: {} samples of {} groups in {} rows",
                  contents.is_packed ? "packed" : "padded", contents.samples.size(),
                  contents.num_groups, contents.rows.size()),
      fmt::format("tokens: {} = {} prompt + {} response; {} in the loss", contents.num_tokens(),
                  contents.num_prompt_tokens, contents.num_response_tokens,
                  contents.num_loss_tokens),
      pads_line(contents)};
  if (contents.num_non_finite > 0) {
    lines.push_back(fmt::format("WRONG: rollout_log_probs of {} tokens in the loss are not finite",
                                contents.num_non_finite));
  }
  return lines;
}

std::string_view finish_name(uint8_t finish_reason) {
  constexpr std::array<std::string_view, 3> kNames = {"stop", "length", "abort"};
  return kNames.at(finish_reason);
}

std::string printable(std::string_view text, size_t max_bytes) {
  std::string shown = is_utf8(text) ? std::string(text) : std::string();
  if (shown.empty()) {
    for (const char c : text) shown += static_cast<uint8_t>(c) < 0x80 ? c : '?';
  }
  std::string clean;
  for (size_t at = 0; at < shown.size(); ++at) {
    if (!is_forbidden(shown, at)) {
      clean += shown[at];
      continue;
    }
    clean += '?';
    while (at + 1 < shown.size() && (static_cast<uint8_t>(shown[at + 1]) & 0xc0) == 0x80) ++at;
  }
  return shortened(clean, max_bytes);
}

}  // namespace rollpack::bridge
