#include "trainer_bridge/inspection/text_drawing.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <string_view>

#include "trainer_bridge/inspection/visible_pairs.h"

namespace rollpack::bridge {
namespace {

constexpr std::string_view kSampleMarks =
    "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
constexpr int64_t kMaskCells = 24;  // lines, so that a mask and its legend fit a terminal of 30
constexpr size_t kMinIdBytes = 8;
constexpr int64_t kSampleNumbers = 60;  // columns of a sample's line beside its prompt_id

enum Kind : uint8_t { kPad, kPrompt, kOutsideLoss, kLoss };
constexpr std::array<char, 4> kKindMarks = {'-', '.', 'o', '#'};

int64_t divided_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

class TextDrawing {
 public:
  TextDrawing(const BatchTable& table, const BatchContents& contents, const DrawingOptions& options)
      : table_(table), contents_(contents), options_(options) {}

  std::string draw(const std::string& state) {
    for (const std::string& line : summary_lines(table_, contents_, state)) text_ += line + '\n';
    const std::vector<int64_t> rows = drawn_rows(contents_, options_);
    draw_columns();
    if (rows.empty()) return text_;
    draw_bars(rows);
    const bool is_chosen = !options_.rows.empty();
    for (const int64_t row : rows) {
      if (is_chosen) draw_samples(row);
      draw_attention(row);
      if (!is_chosen) break;
    }
    return text_;
  }

 private:
  const SampleContents& sample(int64_t s) const { return contents_.samples[s]; }
  static int64_t end_of(const SampleContents& sample) { return sample.begin + sample.num_tokens(); }

  void draw_columns() {
    text_ += "\n  column              dtype  alignment  shape\n";
    constexpr std::array<const char*, 3> kAlignments = {"-", "token", "predictor"};
    for (const TableColumn& column : table_.columns) {
      text_ += fmt::format("  {:<19} {:<6} {:<10} [{}]\n", column.name, column.dtype,
                           kAlignments[static_cast<size_t>(column.alignment)],
                           fmt::join(column.shape, ", "));
    }
  }

  // The most common kind of the tokens in each cell of a row, and whose they are.
  struct Cell {
    std::array<int64_t, 4> kinds = {};
    char sample = ' ';
    int64_t num_samples = 0;
  };

  std::vector<Cell> cells_of(const RowContents& row, int64_t tokens_per_cell) const {
    std::vector<Cell> cells(static_cast<size_t>(divided_up(row.width, tokens_per_cell)));
    const auto add = [&](int64_t begin, int64_t end, Kind kind, int64_t sign = 1) {
      while (begin < end) {
        const int64_t next = std::min(end, (begin / tokens_per_cell + 1) * tokens_per_cell);
        cells[begin / tokens_per_cell].kinds[kind] += sign * (next - begin);
        begin = next;
      }
    };
    add(0, row.width, kPad);
    for (int64_t s = row.first_sample; s < row.first_sample + row.num_samples; ++s) {
      const SampleContents& each = sample(s);
      add(each.begin, end_of(each), kPad, -1);
      add(each.begin, each.begin + each.num_prompt_tokens, kPrompt);
      add(each.begin + each.num_prompt_tokens, end_of(each), kOutsideLoss);
      for (int64_t c = each.begin / tokens_per_cell; c * tokens_per_cell < end_of(each); ++c) {
        cells[c].sample = ++cells[c].num_samples > 1 ? '+' : kSampleMarks[s % kSampleMarks.size()];
      }
    }
    for (const TokenRun& run : row.loss_runs) {
      add(run.begin, run.end, kLoss);
      add(run.begin, run.end, kOutsideLoss, -1);
    }
    return cells;
  }

  void draw_bars(const std::vector<int64_t>& rows) {
    int64_t widest = 1;
    for (const int64_t row : rows) widest = std::max(widest, contents_.rows[row].width);
    const int64_t per_cell = divided_up(widest, std::max<int64_t>(options_.width - 10, 10));
    text_ += fmt::format(
        "\nrows; a cell is {} token{}: . prompt, # in the loss, o response outside "
        "it, - pad\n",
        per_cell, per_cell == 1 ? "" : "s");
    for (const int64_t row : rows) draw_bar(row, per_cell);
    const auto left = static_cast<int64_t>(contents_.rows.size() - rows.size());
    if (left > 0 && options_.rows.empty())
      text_ += fmt::format("  .. {} rows not shown; see --limit and --row\n", left);
  }

  void draw_bar(int64_t number, int64_t per_cell) {
    const RowContents& row = contents_.rows[number];
    std::string marks, kinds;
    for (const Cell& cell : cells_of(row, per_cell)) {
      marks += cell.sample;
      kinds +=
          kKindMarks[std::max_element(cell.kinds.begin(), cell.kinds.end()) - cell.kinds.begin()];
    }
    text_ += fmt::format("row {:<5} {} tokens, {}\n", number, row.num_tokens, samples_text(row));
    text_ += fmt::format("  sample  {}\n  mask    {}\n", marks, kinds);
  }

  static std::string samples_text(const RowContents& row) {
    if (row.num_samples == 0) return "no samples";
    if (row.num_samples == 1) return fmt::format("sample {}", row.first_sample);
    return fmt::format("{} samples, {} to {}", row.num_samples, row.first_sample,
                       row.first_sample + row.num_samples - 1);
  }

  void draw_samples(int64_t number) {
    const RowContents& row = contents_.rows[number];
    const auto id_bytes =
        static_cast<size_t>(std::max<int64_t>(options_.width - kSampleNumbers, kMinIdBytes));
    text_ += fmt::format("\nsamples of row {}\n  {:>6} {:>5} {:>7} {:>8} {:<6} {:>9} {:>9}  {}\n",
                         number, "sample", "index", "prompt", "response", "finish", "versions",
                         "logprob", "prompt_id");
    for (int64_t s = row.first_sample; s < row.first_sample + row.num_samples; ++s) {
      const SampleContents& each = sample(s);
      std::string versions = "-";
      if (each.first_version) {
        versions = each.first_version == each.last_version
                       ? std::to_string(*each.first_version)
                       : fmt::format("{}..{}", *each.first_version, *each.last_version);
      }
      text_ += fmt::format("  {:>6} {:>5} {:>7} {:>8} {:<6} {:>9} {:>9}  {}\n", s,
                           each.sample_index, each.num_prompt_tokens, each.num_response_tokens,
                           finish_name(each.finish_reason), versions,
                           each.mean_logprob ? fmt::format("{:.4f}", *each.mean_logprob) : "-",
                           printable(each.prompt_id, id_bytes));
    }
  }

  void draw_attention(int64_t number) {
    const RowContents& row = contents_.rows[number];
    if (row.width == 0) return;
    const int64_t per_cell =
        divided_up(row.width, std::min(kMaskCells, std::max<int64_t>(options_.width - 4, 10)));
    const int64_t side = divided_up(row.width, per_cell);
    std::vector<int64_t> seen(side * side), tokens(side);
    for (int64_t s = row.first_sample; s < row.first_sample + row.num_samples; ++s) {
      add_pairs(sample(s), per_cell, side, seen, tokens);
    }
    text_ += fmt::format(
        "\nattention of row {}: a query a line, a key a column, {} token{} a "
        "cell:\n# seen, + in part, . unseen, - pads\n",
        number, per_cell, per_cell == 1 ? "" : "s");
    for (int64_t q = 0; q < side; ++q) {
      text_ += "  ";
      for (int64_t k = 0; k < side; ++k) {
        const int64_t queries = std::min(per_cell, row.width - q * per_cell);
        const int64_t keys = std::min(per_cell, row.width - k * per_cell);
        const int64_t pairs = seen[q * side + k];
        const bool is_pad = tokens[q] == 0 || tokens[k] == 0;
        text_ += is_pad ? '-' : pairs == 0 ? '.' : pairs == queries * keys ? '#' : '+';
      }
      text_ += '\n';
    }
  }

  // A sample touches no cell outside its own square, so the work is that of the cells and samples.
  static void add_pairs(const SampleContents& each, int64_t per_cell, int64_t side,
                        std::vector<int64_t>& seen, std::vector<int64_t>& tokens) {
    const int64_t begin = each.begin, end = end_of(each);
    const int64_t first = begin / per_cell, last = divided_up(end, per_cell);
    for (int64_t q = first; q < last; ++q) {
      tokens[q] += std::min(end, (q + 1) * per_cell) - std::max(begin, q * per_cell);
      for (int64_t k = first; k <= q; ++k) {
        seen[q * side + k] += visible_pairs(begin, end, q * per_cell, (q + 1) * per_cell,
                                            k * per_cell, (k + 1) * per_cell);
      }
    }
  }

  const BatchTable& table_;
  const BatchContents& contents_;
  const DrawingOptions& options_;
  std::string text_;
};

}  // namespace

std::string text_drawing(const BatchTable& table, const BatchContents& contents,
                         const std::string& state, const DrawingOptions& options) {
  return TextDrawing(table, contents, options).draw(state);
}

}  // namespace rollpack::bridge
