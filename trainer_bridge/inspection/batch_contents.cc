#include "trainer_bridge/inspection/batch_contents.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::bridge {
namespace {

constexpr int64_t kLastFinishReason = 2;

class ContentsReader {
 public:
  explicit ContentsReader(const BatchTable& table) : table_(table) {}

  BatchContents read() {
    contents_.is_packed = table_.find("cu_seqlens") != nullptr;
    read_samples();
    contents_.is_packed ? read_packed() : read_padded();
    count();
    return std::move(contents_);
  }

 private:
  [[noreturn]] void refuse(const TableColumn& column, uint64_t i, std::string allowed) const {
    const uint64_t width = column.shape.size() == 2 ? std::max<uint64_t>(column.shape[1], 1) : 0;
    throw Error({.code = ErrorCode::kDataLoss,
                 .field = width != 0 ? fmt::format("{}[{}, {}]", column.name, i / width, i % width)
                                     : fmt::format("{}[{}]", column.name, i),
                 .value = column.dtype == "<f4" ? std::to_string(column.real(i))
                                                : std::to_string(column.integer(i)),
                 .origin = table_.origin,
                 .allowed = std::move(allowed)});
  }

  void check_extent(const TableColumn& column, size_t dimension, uint64_t expected,
                    const char* of) const {
    if (column.shape[dimension] == expected) return;
    throw Error({.code = ErrorCode::kDataLoss,
                 .field = fmt::format("column {}: shape[{}]", column.name, dimension),
                 .value = std::to_string(column.shape[dimension]),
                 .origin = table_.origin,
                 .allowed = fmt::format("{}, {}", expected, of)});
  }

  void expect(const TableColumn& column, uint64_t i, int64_t expected, const char* by) const {
    if (column.integer(i) != expected) refuse(column, i, fmt::format("{}, by {}", expected, by));
  }

  const TableColumn& of_samples(const char* name, const char* dtype) const {
    const TableColumn& column = table_.column(name, dtype);
    check_extent(column, 0, num_samples_, "an entry a sample");
    return column;
  }

  // Prefix sums: from 0 to `total`, not decreasing.
  void check_starts(const TableColumn& column, uint64_t total, const char* of) const {
    if (column.num_elements() == 0) {
      check_extent(column, 0, 1, "at least a first entry 0");
    }
    int64_t last = 0;
    for (uint64_t i = 0; i < column.num_elements(); ++i) {
      const int64_t start = column.integer(i);
      if (i == 0 && start != 0) refuse(column, i, "0");
      if (start < last) refuse(column, i, fmt::format("{} or more, the entry before", last));
      last = start;
    }
    if (static_cast<uint64_t>(last) != total) {
      refuse(column, column.num_elements() - 1, fmt::format("{}, {}", total, of));
    }
  }

  void read_samples() {
    const TableColumn& request_ids = table_.column("request_id", "<i8");
    num_samples_ = request_ids.num_elements();
    const TableColumn& prompt_indices = of_samples("prompt_index", "<i4");
    const TableColumn& sample_indices = of_samples("sample_index", "<i4");
    const TableColumn& prompt_lens = of_samples("prompt_lens", "<i4");
    const TableColumn& response_lens = of_samples("response_lens", "<i4");
    const TableColumn& finish_reasons = of_samples("finish_reason", "|u1");
    const TableColumn& id_bytes = table_.column("prompt_id_bytes", "|u1");
    const TableColumn& id_starts = table_.column("prompt_id_starts", "<i4");
    check_extent(id_starts, 0, num_samples_ + 1, "an entry a sample and one more");
    check_starts(id_starts, id_bytes.num_elements(), "the entries of prompt_id_bytes");
    contents_.samples.reserve(num_samples_);
    for (uint64_t s = 0; s < num_samples_; ++s) {
      if (prompt_lens.integer(s) < 0) refuse(prompt_lens, s, "0 or more");
      if (response_lens.integer(s) < 0) refuse(response_lens, s, "0 or more");
      if (finish_reasons.integer(s) > kLastFinishReason) {
        refuse(finish_reasons, s, "0 (stop), 1 (length) or 2 (abort)");
      }
      SampleContents sample;
      sample.request_id = request_ids.integer(s);
      sample.prompt_index = prompt_indices.integer(s);
      sample.sample_index = sample_indices.integer(s);
      const auto id = id_bytes.bytes.subspan(id_starts.integer(s),
                                             id_starts.integer(s + 1) - id_starts.integer(s));
      sample.prompt_id.assign(reinterpret_cast<const char*>(id.data()), id.size());
      sample.num_prompt_tokens = prompt_lens.integer(s);
      sample.num_response_tokens = response_lens.integer(s);
      sample.finish_reason = static_cast<uint8_t>(finish_reasons.integer(s));
      contents_.samples.push_back(std::move(sample));
    }
  }

  void read_packed() {
    const TableColumn& input_ids = table_.column("input_ids", "<i4");
    const TableColumn& cu_seqlens = table_.column("cu_seqlens", "<i4");
    const TableColumn& row_starts = table_.column("row_starts", "<i4");
    check_extent(cu_seqlens, 0, num_samples_ + 1, "an entry a sample and one more");
    check_starts(cu_seqlens, input_ids.num_elements(), "the tokens of input_ids");
    check_starts(row_starts, num_samples_, "the number of samples");
    check_tokens(cu_seqlens, input_ids.num_elements());
    const TableColumn& loss = table_.column("loss_mask", "|u1");
    for (uint64_t m = 0; m + 1 < row_starts.num_elements(); ++m) {
      RowContents row{.first_sample = row_starts.integer(m),
                      .num_samples = row_starts.integer(m + 1) - row_starts.integer(m)};
      const int64_t first_token = cu_seqlens.integer(row.first_sample);
      row.width = cu_seqlens.integer(row.first_sample + row.num_samples) - first_token;
      row.num_tokens = row.width;
      for (int64_t s = row.first_sample; s < row.first_sample + row.num_samples; ++s) {
        contents_.samples[s].begin = cu_seqlens.integer(s) - first_token;
      }
      read_loss(row, loss, first_token, 0, row.width);
      contents_.rows.push_back(std::move(row));
    }
    const TableColumn& logprobs = table_.column("rollout_log_probs", "<f4");
    for (uint64_t s = 0; s < num_samples_; ++s) {
      read_logprobs(contents_.samples[s], logprobs, loss, cu_seqlens.integer(s),
                    cu_seqlens.integer(s + 1));
    }
  }

  // What the columns of tokens say beside cu_seqlens.
  void check_tokens(const TableColumn& cu_seqlens, uint64_t num_tokens) {
    const TableColumn& positions = table_.column("position_ids", "<i4");
    const TableColumn& segments = table_.column("segment_ids", "<i4");
    const TableColumn& versions = table_.column("weight_versions", "<i4");
    for (const TableColumn* column :
         {&positions, &segments, &versions, &table_.column("loss_mask", "|u1"),
          &table_.column("rollout_log_probs", "<f4")}) {
      check_extent(*column, 0, num_tokens, "an entry a token");
    }
    for (uint64_t s = 0; s < num_samples_; ++s) {
      SampleContents& sample = contents_.samples[s];
      const int64_t begin = cu_seqlens.integer(s), end = cu_seqlens.integer(s + 1);
      if (sample.num_tokens() != end - begin) {
        refuse(cu_seqlens, s + 1,
               fmt::format("{}, by prompt_lens and response_lens", begin + sample.num_tokens()));
      }
      for (int64_t t = begin; t < end; ++t) {
        expect(positions, t, t - begin, "cu_seqlens");
        expect(segments, t, static_cast<int64_t>(s), "cu_seqlens");
      }
      if (sample.num_response_tokens == 0) continue;
      sample.first_version = versions.integer(begin + sample.num_prompt_tokens);
      sample.last_version = versions.integer(end - 1);
    }
  }

  void read_padded() {
    const TableColumn& input_ids = table_.column("input_ids", "<i8", 2);
    const uint64_t prompt_width = table_.column("prompts", "<i8", 2).shape[1];
    const uint64_t response_width = table_.column("responses", "<i8", 2).shape[1];
    const uint64_t width = prompt_width + response_width;
    const TableColumn& prompt_lens = table_.column("prompt_lens", "<i4");
    const TableColumn& response_lens = table_.column("response_lens", "<i4");
    const TableColumn& mask = table_.column("attention_mask", "<i8", 2);
    const TableColumn& positions = table_.column("position_ids", "<i8", 2);
    const TableColumn& loss = table_.column("response_mask", "<i8", 2);
    const TableColumn& logprobs = table_.column("rollout_log_probs", "<f4", 2);
    for (const auto& [column, columns] :
         {std::pair(&table_.column("prompts", "<i8", 2), prompt_width),
          std::pair(&table_.column("responses", "<i8", 2), response_width),
          std::pair(&loss, response_width), std::pair(&logprobs, response_width),
          std::pair(&input_ids, width), std::pair(&mask, width), std::pair(&positions, width)}) {
      check_extent(*column, 0, num_samples_, "a row a sample");
      check_extent(*column, 1, columns, "by the columns of prompts and responses");
    }
    for (uint64_t s = 0; s < num_samples_; ++s) {
      SampleContents& sample = contents_.samples[s];
      check_length(prompt_lens, s, prompt_width);
      check_length(response_lens, s, response_width);
      sample.begin = static_cast<int64_t>(prompt_width) - sample.num_prompt_tokens;
      check_row(sample, mask, positions, s, width);
      RowContents row{.first_sample = static_cast<int64_t>(s),
                      .num_samples = 1,
                      .width = static_cast<int64_t>(width),
                      .num_tokens = sample.num_tokens()};
      const auto first = static_cast<int64_t>(s * response_width);
      read_loss(row, loss, first, static_cast<int64_t>(prompt_width),
                static_cast<int64_t>(response_width));
      read_logprobs(sample, logprobs, loss, first, first + static_cast<int64_t>(response_width));
      contents_.rows.push_back(std::move(row));
    }
  }

  void check_length(const TableColumn& lengths, uint64_t s, uint64_t width) const {
    if (static_cast<uint64_t>(lengths.integer(s)) <= width) return;
    refuse(lengths, s, fmt::format("at most {}, the columns there are", width));
  }

  void check_row(const SampleContents& sample, const TableColumn& mask,
                 const TableColumn& positions, uint64_t s, uint64_t width) const {
    const int64_t end = sample.begin + sample.num_tokens();
    int64_t position = 0;
    for (int64_t t = 0; t < static_cast<int64_t>(width); ++t) {
      const bool is_real = t >= sample.begin && t < end;
      if (is_real) position = t - sample.begin;
      expect(mask, s * width + t, is_real ? 1 : 0, "prompt_lens and response_lens");
      expect(positions, s * width + t, position, "attention_mask");
    }
  }

  // Runs of 1 in entries first .. first + count of `mask`, which are columns `at` .. of the row.
  void read_loss(RowContents& row, const TableColumn& mask, int64_t first, int64_t at,
                 int64_t count) {
    for (int64_t t = 0; t < count; ++t) {
      const int64_t value = mask.integer(first + t);
      if (value != 0 && value != 1) refuse(mask, first + t, "0 or 1");
      if (value == 0) continue;
      ++contents_.num_loss_tokens;
      if (!row.loss_runs.empty() && row.loss_runs.back().end == at + t) {
        ++row.loss_runs.back().end;
      } else {
        row.loss_runs.push_back({at + t, at + t + 1});
      }
    }
  }

  void read_logprobs(SampleContents& sample, const TableColumn& logprobs, const TableColumn& mask,
                     int64_t begin, int64_t end) {
    double sum = 0;
    int64_t number = 0;
    for (int64_t t = begin; t < end; ++t) {
      if (mask.integer(t) == 0) continue;
      if (!std::isfinite(logprobs.real(t))) ++contents_.num_non_finite;
      sum += logprobs.real(t);
      ++number;
    }
    if (number > 0) sample.mean_logprob = sum / static_cast<double>(number);
  }

  void count() {
    std::vector<std::pair<int64_t, int64_t>> groups;
    for (const SampleContents& sample : contents_.samples) {
      groups.emplace_back(sample.request_id, sample.prompt_index);
      contents_.num_prompt_tokens += sample.num_prompt_tokens;
      contents_.num_response_tokens += sample.num_response_tokens;
      contents_.longest_prompt = std::max(contents_.longest_prompt, sample.num_prompt_tokens);
      contents_.longest_response = std::max(contents_.longest_response, sample.num_response_tokens);
    }
    std::sort(groups.begin(), groups.end());
    contents_.num_groups = std::unique(groups.begin(), groups.end()) - groups.begin();
    for (const RowContents& row : contents_.rows) contents_.num_pads += row.width - row.num_tokens;
  }

  const BatchTable& table_;
  BatchContents contents_;
  uint64_t num_samples_ = 0;
};

}  // namespace

BatchContents read_batch_contents(const BatchTable& table) {
  return ContentsReader(table).read();
}

}  // namespace rollpack::bridge
