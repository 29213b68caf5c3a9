// The packed layout: what a varlen attention call with cu_seqlens reads as it is.
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>

#include "kernels/base/error.h"
#include "trainer_bridge/layout/column.h"
#include "trainer_bridge/layout/layouts.h"
#include "trainer_bridge/layout/sample_columns.h"
#include "trainer_bridge/packing/bin_packing.h"

namespace rollpack::bridge {
namespace {

int64_t num_tokens(const Sample& sample) {
  return static_cast<int64_t>(sample.prompt_ids->size() + sample.response_ids.size());
}

// Where each sample lies.
struct Rows {
  std::vector<const Sample*> samples;  // [S], row by row
  std::vector<int32_t> cu_seqlens;     // [S + 1]
  std::vector<int32_t> row_starts;     // [M + 1]
};
using SharedRows = std::shared_ptr<const Rows>;

std::vector<int64_t> checked_lengths(std::span<const Sample* const> samples,
                                     int64_t max_tokens_per_row) {
  std::vector<int64_t> lengths;
  lengths.reserve(samples.size());
  for (const Sample* sample : samples) {
    const int64_t length = num_tokens(*sample);
    if (length > max_tokens_per_row) {
      throw Error(
          {.code = ErrorCode::kInvalidArgument,
           .field = "bridge.max_tokens_per_row",
           .value = std::to_string(max_tokens_per_row),
           .origin = sample_name(*sample),
           .allowed = fmt::format("{} or more, the {} prompt and {} response tokens of the "
                                  "sample",
                                  length, sample->prompt_ids->size(), sample->response_ids.size()),
           .message = "a sample is never split between rows"});
    }
    lengths.push_back(length);
  }
  return lengths;
}

Rows pack_rows(std::span<const Sample* const> samples, int64_t max_tokens_per_row) {
  const std::vector<int64_t> lengths = checked_lengths(samples, max_tokens_per_row);
  Rows rows{.cu_seqlens = {0}, .row_starts = {0}};
  for (const std::vector<int32_t>& row : pack_best_fit_decreasing(lengths, max_tokens_per_row)) {
    for (const int32_t s : row) {
      rows.samples.push_back(samples[s]);
      rows.cu_seqlens.push_back(rows.cu_seqlens.back() + static_cast<int32_t>(lengths[s]));
    }
    rows.row_starts.push_back(static_cast<int32_t>(rows.samples.size()));
  }
  return rows;
}

Rows given_rows(std::span<const Sample* const> samples, std::span<const int32_t> row_starts,
                int64_t max_tokens_per_row) {
  Rows rows{.samples = {samples.begin(), samples.end()},
            .cu_seqlens = {0},
            .row_starts = {row_starts.begin(), row_starts.end()}};
  for (const int64_t length : checked_lengths(samples, max_tokens_per_row)) {
    rows.cu_seqlens.push_back(rows.cu_seqlens.back() + static_cast<int32_t>(length));
  }
  for (size_t m = 0; m + 1 < row_starts.size(); ++m) {
    const int32_t begin = row_starts[m], end = row_starts[m + 1];
    if (begin > end || static_cast<size_t>(end) > samples.size() ||
        rows.cu_seqlens[end] - rows.cu_seqlens[begin] > max_tokens_per_row) {
      fail_invariant(fmt::format("row {} of samples {} to {}, of {}, at most {} tokens", m, begin,
                                 end, samples.size(), max_tokens_per_row));
    }
  }
  if (row_starts.front() != 0 || static_cast<size_t>(row_starts.back()) != samples.size()) {
    fail_invariant("rows that leave samples out");
  }
  return rows;
}

// One entry a token; `fill(sample, s, prompt, response)` sets those of sample number s.
template <class T, class Fill>
Column token_column(std::string name, const SharedRows& rows, Fill fill) {
  const auto total = static_cast<uint64_t>(rows->cu_seqlens.back());
  return make_column<T>(
      std::move(name), Alignment::kToken, {total}, [rows, fill](std::span<T> out) {
        for (size_t s = 0; s < rows->samples.size(); ++s) {
          const Sample& sample = *rows->samples[s];
          const std::span<T> tokens = out.subspan(rows->cu_seqlens[s], num_tokens(sample));
          const size_t num_prompt = sample.prompt_ids->size();
          fill(sample, s, tokens.first(num_prompt), tokens.subspan(num_prompt));
        }
      });
}

template <class T>
void fill_with(std::span<T> out, T value) {
  std::fill(out.begin(), out.end(), value);
}

using PackedIds = std::span<int32_t>;

Column input_ids(const SharedRows& rows) {
  return token_column<int32_t>(
      "input_ids", rows, [](const Sample& sample, size_t, PackedIds prompt, PackedIds response) {
        std::copy(sample.prompt_ids->begin(), sample.prompt_ids->end(), prompt.begin());
        std::copy(sample.response_ids.begin(), sample.response_ids.end(), response.begin());
      });
}

Column position_ids(const SharedRows& rows) {
  return token_column<int32_t>(
      "position_ids", rows, [](const Sample&, size_t, PackedIds prompt, PackedIds response) {
        std::iota(prompt.begin(), prompt.end(), 0);
        std::iota(response.begin(), response.end(), static_cast<int32_t>(prompt.size()));
      });
}

Column segment_ids(const SharedRows& rows) {
  return token_column<int32_t>("segment_ids", rows,
                               [](const Sample&, size_t s, PackedIds prompt, PackedIds response) {
                                 fill_with(prompt, static_cast<int32_t>(s));
                                 fill_with(response, static_cast<int32_t>(s));
                               });
}

Column loss_mask(const SharedRows& rows) {
  return token_column<uint8_t>(
      "loss_mask", rows,
      [](const Sample&, size_t, std::span<uint8_t> prompt, std::span<uint8_t> response) {
        fill_with<uint8_t>(prompt, 0);
        fill_with<uint8_t>(response, 1);
      });
}

Column weight_versions(const SharedRows& rows) {
  return token_column<int32_t>(
      "weight_versions", rows,
      [](const Sample& sample, size_t, PackedIds prompt, PackedIds response) {
        fill_with(prompt, -1);
        for (const VersionSpan& span : sample.weight_versions) {
          fill_with(response.subspan(span.first_token), static_cast<int32_t>(span.version));
        }
      });
}

Column value_column(const SharedRows& rows, const ResponseValues& values) {
  return token_column<float>(
      std::string(values.name), rows,
      [copy = values.copy](const Sample& sample, size_t, std::span<float> prompt,
                           std::span<float> response) {
        fill_with(prompt, std::numeric_limits<float>::quiet_NaN());
        copy(sample, response);
      });
}

Column starts_column(std::string name, const SharedRows& rows, std::vector<int32_t> Rows::*starts) {
  return make_column<int32_t>(std::move(name), Alignment::kNone, {((*rows).*starts).size()},
                              [rows, starts](PackedIds out) {
                                const std::vector<int32_t>& values = (*rows).*starts;
                                std::copy(values.begin(), values.end(), out.begin());
                              });
}

class PackedLayout : public BatchLayout {
 public:
  using BatchLayout::BatchLayout;

  int64_t max_tokens_per_row() const override { return options().max_tokens_per_row; }

  int64_t num_places(std::span<const Sample* const> samples) const override {
    int64_t num_tokens = 0;
    for (const Sample* sample : samples) {
      num_tokens += static_cast<int64_t>(sample->prompt_ids->size() + sample->response_ids.size());
    }
    return num_tokens;
  }

 protected:
  std::vector<Column> columns(std::span<const Sample* const> samples,
                              std::span<const int32_t> row_starts) const override {
    const auto rows = std::make_shared<const Rows>(
        row_starts.empty() ? pack_rows(samples, options().max_tokens_per_row)
                           : given_rows(samples, row_starts, options().max_tokens_per_row));
    std::vector<Column> columns = {
        input_ids(rows),
        position_ids(rows),
        segment_ids(rows),
        starts_column("cu_seqlens", rows, &Rows::cu_seqlens),
        starts_column("row_starts", rows, &Rows::row_starts),
        loss_mask(rows),
        weight_versions(rows),
    };
    for (const ResponseValues& values :
         response_values(options().logprobs_mode, options().columns)) {
      columns.push_back(value_column(rows, values));
    }
    append_sample_columns(SampleList(rows, &rows->samples), columns);
    return columns;
  }
};

}  // namespace

std::unique_ptr<BatchLayout> make_packed_layout(const LayoutOptions& options) {
  return std::make_unique<PackedLayout>(options);
}

}  // namespace rollpack::bridge
