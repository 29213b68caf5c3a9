#include "trainer_bridge/inspection/svg_drawing.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string_view>

namespace rollpack::bridge {
namespace {

// Pixels.
constexpr double kMargin = 16;
constexpr double kLine = 18;
constexpr double kBarsLeft = 110;
constexpr double kBarsWidth = 640;
constexpr double kBandHeight = 26;
constexpr double kMaskLeft = kBarsLeft + kBarsWidth + 30;
constexpr double kMaskSide = 130;
constexpr double kRowHeight = kMaskSide + 34;
constexpr double kWidth = kMaskLeft + kMaskSide + kMargin;
constexpr size_t kMaxIdBytes = 60;

// Neighbours differ in hue, prompt and response of one sample in lightness.
struct Colors {
  const char* prompt;
  const char* response;
};
constexpr std::array<Colors, 6> kSampleColors = {{{"#a6cee3", "#1f78b4"},
                                                  {"#b2df8a", "#33a02c"},
                                                  {"#fdbf6f", "#e07000"},
                                                  {"#cab2d6", "#6a3d9a"},
                                                  {"#fb9a99", "#c51b1b"},
                                                  {"#c7c7a0", "#7a7a30"}}};

constexpr std::string_view kStyle =
    "text{font:13px sans-serif;fill:#222}.note{font-size:11px;fill:#666}"
    ".pad{fill:#ddd}.loss{fill:#222}.frame{fill:none;stroke:#999;stroke-width:1}";

std::string escaped(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

class SvgDrawing {
 public:
  SvgDrawing(const BatchContents& contents, std::vector<int64_t> rows)
      : contents_(contents), rows_(std::move(rows)) {
    for (const int64_t row : rows_) widest_ = std::max(widest_, contents_.rows[row].width);
  }

  std::string draw(const std::vector<std::string>& summary) {
    const double top = kMargin + kLine * static_cast<double>(summary.size() + 2);
    const double height = top + kRowHeight * static_cast<double>(rows_.size()) + kMargin;
    svg_ = fmt::format(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<svg xmlns=\"http://www.w3.org/2000/svg\" "
        "width=\"{0:.0f}\" height=\"{1:.0f}\" viewBox=\"0 0 {0:.0f} {1:.0f}\">\n"
        "<style>{2}</style>\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        kWidth, height, kStyle);
    double y = kMargin;
    for (const std::string& line : summary) add_text(kMargin, y += kLine, "", line);
    add_text(kMargin, y += kLine, "note",
             fmt::format("Light: prompt, dark: response; below, black: in the loss; grey: pads. "
                         "Right: key (across) seen by query (down). {} of {} rows.",
                         rows_.size(), contents_.rows.size()));
    for (size_t i = 0; i < rows_.size(); ++i) {
      add_row(rows_[i], top + kRowHeight * static_cast<double>(i));
    }
    svg_ += "</svg>\n";
    return std::move(svg_);
  }

 private:
  double x_of(int64_t token) const {
    return kBarsLeft + kBarsWidth * static_cast<double>(token) / static_cast<double>(widest_);
  }

  void add_text(double x, double y, std::string_view style, std::string_view text) {
    svg_ += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" class=\"{}\">{}</text>\n", x, y, style,
                        escaped(text));
  }

  // Tokens begin .. end of a row as a rectangle; nothing where there are none.
  void add_band(std::string_view style, std::string_view fill, int64_t begin, int64_t end, double y,
                double height, std::string_view title) {
    if (begin == end) return;
    svg_ += fmt::format(
        "<rect class=\"{}\" x=\"{:.2f}\" y=\"{:.1f}\" width=\"{:.2f}\" "
        "height=\"{:.1f}\"{}><title>{}</title></rect>\n",
        style, x_of(begin), y, x_of(end) - x_of(begin), height,
        fill.empty() ? "" : fmt::format(" fill=\"{}\"", fill), escaped(title));
  }

  void add_row(int64_t number, double y) {
    const RowContents& row = contents_.rows[number];
    svg_ += fmt::format("<g class=\"row\" id=\"row-{}\">\n", number);
    add_text(kMargin, y + kBandHeight - 8, "", fmt::format("row {}", number));
    add_text(kMargin, y + kBandHeight + 8, "note", fmt::format("{} tokens", row.num_tokens));
    add_text(kMargin, y + 2 * kBandHeight + 2, "note", "loss mask");
    int64_t filled = 0;
    for (int64_t s = row.first_sample; s < row.first_sample + row.num_samples; ++s) {
      add_sample(s, filled, y);
    }
    add_pad(filled, row.width, y);
    for (const TokenRun& run : row.loss_runs) {
      add_band("loss", "", run.begin, run.end, y + kBandHeight + 4, kBandHeight / 2,
               fmt::format("{} tokens in the loss", run.end - run.begin));
    }
    if (row.width > 0) add_mask(row, y);
    svg_ += "</g>\n";
  }

  void add_pad(int64_t begin, int64_t end, double y) {
    add_band("pad", "", begin, end, y, kBandHeight, fmt::format("{} pads", end - begin));
  }

  // Draws sample `s` and the pads before it; `filled` is where the one before ended.
  void add_sample(int64_t s, int64_t& filled, double y) {
    const SampleContents& sample = contents_.samples[s];
    const Colors& colors = kSampleColors[s % kSampleColors.size()];
    const std::string title = fmt::format(
        "sample {}: prompt {}, sample_index {}, {} + {} tokens, {}", s,
        printable(sample.prompt_id, kMaxIdBytes), sample.sample_index, sample.num_prompt_tokens,
        sample.num_response_tokens, finish_name(sample.finish_reason));
    const int64_t response = sample.begin + sample.num_prompt_tokens;
    const int64_t end = sample.begin + sample.num_tokens();
    add_pad(filled, sample.begin, y);
    add_band("prompt", colors.prompt, sample.begin, response, y, kBandHeight, title);
    add_band("response", colors.response, response, end, y, kBandHeight, title);
    filled = end;
  }

  void add_mask(const RowContents& row, double y) {
    const double scale = kMaskSide / static_cast<double>(row.width);
    svg_ += fmt::format(
        "<rect class=\"frame\" x=\"{0:.1f}\" y=\"{1:.1f}\" width=\"{2}\" "
        "height=\"{2}\"/>\n",
        kMaskLeft, y, kMaskSide);
    for (int64_t s = row.first_sample; s < row.first_sample + row.num_samples; ++s) {
      const SampleContents& sample = contents_.samples[s];
      if (sample.num_tokens() == 0) continue;
      const double begin = scale * static_cast<double>(sample.begin);
      const double side = scale * static_cast<double>(sample.num_tokens());
      svg_ += fmt::format(
          "<path class=\"attention\" d=\"M{:.2f} {:.2f}v{:.2f}h{:.2f}z\" "
          "fill=\"{}\"><title>sample {}: {} tokens, each sees those before it"
          "</title></path>\n",
          kMaskLeft + begin, y + begin, side, side,
          kSampleColors[s % kSampleColors.size()].response, s, sample.num_tokens());
    }
  }

  const BatchContents& contents_;
  const std::vector<int64_t> rows_;
  int64_t widest_ = 1;
  std::string svg_;
};

}  // namespace

std::string svg_drawing(const BatchTable& table, const BatchContents& contents,
                        const std::string& state, const DrawingOptions& options) {
  return SvgDrawing(contents, drawn_rows(contents, options))
      .draw(summary_lines(table, contents, state));
}

}  // namespace rollpack::bridge
