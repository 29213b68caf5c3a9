// The padded layout, as verl's DataProto has it. Masks and positions come from lengths, so that a
// pad id that is also an ordinary token or the EOS id confuses nothing.
#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>

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

Grid make_grid(std::span<const Sample* const> samples) {
  Grid grid{.samples =
                std::make_shared<const std::vector<const Sample*>>(samples.begin(), samples.end())};
  for (const Sample* sample : samples) {
    grid.prompt_width = std::max<uint64_t>(grid.prompt_width, sample->prompt_ids->size());
    grid.response_width = std::max<uint64_t>(grid.response_width, sample->response_ids.size());
  }
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

using Ids = std::span<int64_t>;

void put_prompt(const Sample& sample, Ids part) {
  std::copy(sample.prompt_ids->begin(), sample.prompt_ids->end(),
            part.last(sample.prompt_ids->size()).begin());
}

void put_response(const Sample& sample, Ids part) {
  std::copy(sample.response_ids.begin(), sample.response_ids.end(), part.begin());
}

void append_id_columns(const Grid& grid, int64_t pad, std::vector<Column>& columns) {
  const uint64_t prompt_width = grid.prompt_width;
  columns.push_back(row_column<int64_t>("prompts", grid.samples, prompt_width, pad, put_prompt));
  columns.push_back(
      row_column<int64_t>("responses", grid.samples, grid.response_width, pad, put_response));
  columns.push_back(row_column<int64_t>("input_ids", grid.samples,
                                        prompt_width + grid.response_width, pad,
                                        [prompt_width](const Sample& sample, Ids row) {
                                          put_prompt(sample, row.first(prompt_width));
                                          put_response(sample, row.subspan(prompt_width));
                                        }));
}

// The real tokens of a row of input_ids.
Ids real_part(const Sample& sample, uint64_t prompt_width, Ids row) {
  const size_t num_prompt = sample.prompt_ids->size();
  return row.subspan(prompt_width - num_prompt, num_prompt + sample.response_ids.size());
}

void append_mask_columns(const Grid& grid, std::vector<Column>& columns) {
  const uint64_t prompt_width = grid.prompt_width;
  const uint64_t width = prompt_width + grid.response_width;
  columns.push_back(row_column<int64_t>("attention_mask", grid.samples, width, 0,
                                        [prompt_width](const Sample& sample, Ids row) {
                                          const Ids real = real_part(sample, prompt_width, row);
                                          std::fill(real.begin(), real.end(), 1);
                                        }));
  // max(cumsum(attention_mask) - 1, 0): 0 on left pads, the last token's position on right pads.
  columns.push_back(row_column<int64_t>("position_ids", grid.samples, width, 0,
                                        [prompt_width](const Sample& sample, Ids row) {
                                          const Ids real = real_part(sample, prompt_width, row);
                                          if (real.empty()) return;
                                          std::iota(real.begin(), real.end(), 0);
                                          std::fill(real.end(), row.end(), real.back());
                                        }));
  columns.push_back(row_column<int64_t>("response_mask", grid.samples, grid.response_width, 0,
                                        [](const Sample& sample, Ids row) {
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

 protected:
  std::vector<Column> columns(std::span<const Sample* const> samples) const override {
    const Grid grid = make_grid(samples);
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
