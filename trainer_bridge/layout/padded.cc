// The padded layout, as verl's DataProto has it. Masks and positions come from lengths, so that a
// pad id that is also an ordinary token or the EOS id confuses nothing.
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>

#include "kernels/base/error.h"
#include "trainer_bridge/layout/column.h"
#include "trainer_bridge/layout/layouts.h"
#include "trainer_bridge/layout/sample_columns.h"

namespace rollpack::bridge {
namespace {

// Samples, one a row, and the columns of their prompt and response parts.
struct Grid {
  SampleList samples;           // [B]
  uint64_t prompt_width = 0;    // P
  uint64_t response_width = 0;  // R
};

// The columns of one part: `fixed`, or where that is 0 the longest, rounded up.
uint64_t width_of(std::span<const Sample* const> samples, size_t (*length)(const Sample&),
                  const char* field, int32_t fixed, int32_t multiple_of) {
  uint64_t longest = 0;
  for (const Sample* sample : samples) {
    longest = std::max<uint64_t>(longest, length(*sample));
    if (fixed == 0 || longest <= static_cast<uint64_t>(fixed)) continue;
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = field,
                 .value = std::to_string(fixed),
                 .origin = sample_name(*sample),
                 .allowed = fmt::format("{} or more, its tokens", longest),
                 .message = "a sample is never cut: raise it, or 0 for the longest of each batch"});
  }
  if (fixed != 0) return static_cast<uint64_t>(fixed);
  const auto multiple = static_cast<uint64_t>(multiple_of);
  return (longest + multiple - 1) / multiple * multiple;
}

Grid make_grid(std::span<const Sample* const> samples, const LayoutOptions& options) {
  Grid grid{.samples =
                std::make_shared<const std::vector<const Sample*>>(samples.begin(), samples.end())};
  grid.prompt_width = width_of(
      samples, [](const Sample& s) { return s.prompt_ids->size(); }, "bridge.prompt_width",
      options.prompt_width, options.pad_to_multiple_of);
  grid.response_width = width_of(
      samples, [](const Sample& s) { return s.response_ids.size(); }, "bridge.response_width",
      options.response_width, options.pad_to_multiple_of);
  return grid;
}

// [B, width], one row a sample; `fill(sample, row)` sets a row that is `pad` all over.
template <class T, class Fill>
Column row_column(std::string name, const SampleList& samples, uint64_t width, T pad, Fill fill) {
  return make_column<T>(std::move(name), Alignment::kToken, {samples->size(), width},
                        [samples, width, pad, fill](std::span<T> out) {
                          std::fill(out.begin(), out.end(), pad);
                          for (size_t b = 0; b < samples->size(); ++b) {
                            fill(*(*samples)[b], out.subspan(b * width, width));
                          }
                        });
}

using PaddedIds = std::span<int64_t>;

void put_prompt(const Sample& sample, PaddedIds part) {
  std::copy(sample.prompt_ids->begin(), sample.prompt_ids->end(),
            part.last(sample.prompt_ids->size()).begin());
}

void put_response(const Sample& sample, PaddedIds part) {
  std::copy(sample.response_ids.begin(), sample.response_ids.end(), part.begin());
}

void append_id_columns(const Grid& grid, int64_t pad, std::vector<Column>& columns) {
  const uint64_t prompt_width = grid.prompt_width;
  columns.push_back(row_column<int64_t>("prompts", grid.samples, prompt_width, pad, put_prompt));
  columns.push_back(
      row_column<int64_t>("responses", grid.samples, grid.response_width, pad, put_response));
  columns.push_back(row_column<int64_t>("input_ids", grid.samples,
                                        prompt_width + grid.response_width, pad,
                                        [prompt_width](const Sample& sample, PaddedIds row) {
                                          put_prompt(sample, row.first(prompt_width));
                                          put_response(sample, row.subspan(prompt_width));
                                        }));
}

// The real tokens of a row of input_ids.
PaddedIds real_part(const Sample& sample, uint64_t prompt_width, PaddedIds row) {
  const size_t num_prompt = sample.prompt_ids->size();
  return row.subspan(prompt_width - num_prompt, num_prompt + sample.response_ids.size());
}

void append_mask_columns(const Grid& grid, std::vector<Column>& columns) {
  const uint64_t prompt_width = grid.prompt_width;
  const uint64_t width = prompt_width + grid.response_width;
  columns.push_back(row_column<int64_t>("attention_mask", grid.samples, width, 0,
                                        [prompt_width](const Sample& sample, PaddedIds row) {
                                          const PaddedIds real =
                                              real_part(sample, prompt_width, row);
                                          std::fill(real.begin(), real.end(), 1);
                                        }));
  // max(cumsum(attention_mask) - 1, 0): 0 on left pads, the last token's position on right pads.
  columns.push_back(row_column<int64_t>(
      "position_ids", grid.samples, width, 0, [prompt_width](const Sample& sample, PaddedIds row) {
        const PaddedIds real = real_part(sample, prompt_width, row);
        if (real.empty()) return;
        std::iota(real.begin(), real.end(), 0);
        std::fill(real.end(), row.end(), real.back());
      }));
  columns.push_back(row_column<int64_t>("response_mask", grid.samples, grid.response_width, 0,
                                        [](const Sample& sample, PaddedIds row) {
                                          std::fill_n(row.begin(), sample.response_ids.size(), 1);
                                        }));
}

Column value_column(const Grid& grid, const ResponseValues& values) {
  return row_column<float>(std::string(values.name), grid.samples, grid.response_width, 0.0f,
                           [copy = values.copy](const Sample& sample, std::span<float> row) {
                             copy(sample, row.first(sample.response_ids.size()));
                           });
}

class PaddedLayout : public BatchLayout {
 public:
  using BatchLayout::BatchLayout;

  int64_t max_tokens_per_row() const override { return 0; }

  int64_t num_places(std::span<const Sample* const> samples) const override {
    const Grid grid = make_grid(samples, options());
    return static_cast<int64_t>(samples.size() * (grid.prompt_width + grid.response_width));
  }

 protected:
  std::vector<Column> columns(std::span<const Sample* const> samples,
                              std::span<const int32_t>) const override {
    const Grid grid = make_grid(samples, options());
    std::vector<Column> columns;
    append_id_columns(grid, options().pad_token_id, columns);
    append_mask_columns(grid, columns);
    for (const ResponseValues& values :
         response_values(options().logprobs_mode, options().columns)) {
      columns.push_back(value_column(grid, values));
    }
    append_sample_columns(grid.samples, columns);
    return columns;
  }
};

}  // namespace

std::unique_ptr<BatchLayout> make_padded_layout(const LayoutOptions& options) {
  return std::make_unique<PaddedLayout>(options);
}

}  // namespace rollpack::bridge
