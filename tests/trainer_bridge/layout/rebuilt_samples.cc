#include "tests/trainer_bridge/layout/rebuilt_samples.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

namespace rollpack::bridge::testing {
namespace {

// The columns with one entry a sample.
std::vector<RebuiltSample> sample_fields(const ReadBatch& batch) {
  const auto request_id = batch.values<int64_t>("request_id");
  const auto prompt_index = batch.values<int32_t>("prompt_index");
  const auto sample_index = batch.values<int32_t>("sample_index");
  const auto group_size = batch.values<int32_t>("group_size");
  const auto prompt_lens = batch.values<int32_t>("prompt_lens");
  const auto response_lens = batch.values<int32_t>("response_lens");
  const auto finish_reason = batch.values<uint8_t>("finish_reason");
  const auto stop_token_id = batch.values<int32_t>("stop_token_id");
  const auto temperature = batch.values<float>("temperature");
  const auto id_bytes = batch.values<uint8_t>("prompt_id_bytes");
  const auto id_starts = batch.values<int32_t>("prompt_id_starts");

  const size_t num_samples = request_id.size();
  EXPECT_EQ(id_starts.size(), num_samples + 1);
  EXPECT_EQ(id_starts.at(0), 0);
  EXPECT_EQ(id_starts.at(num_samples), static_cast<int32_t>(id_bytes.size()));
  std::vector<RebuiltSample> samples(num_samples);
  for (size_t s = 0; s < num_samples; ++s) {
    RebuiltSample& sample = samples[s];
    sample.request_id = request_id[s];
    sample.prompt_index = prompt_index.at(s);
    sample.prompt_id.assign(id_bytes.begin() + id_starts[s], id_bytes.begin() + id_starts[s + 1]);
    sample.sample_index = sample_index.at(s);
    sample.group_size = group_size.at(s);
    sample.prompt_ids.resize(prompt_lens.at(s));
    sample.response_ids.resize(response_lens.at(s));
    sample.finish_reason = finish_reason.at(s);
    sample.stop_token_id = stop_token_id.at(s);
    sample.temperature = temperature.at(s);
  }
  return samples;
}

template <class T>
std::vector<T> part(const std::vector<T>& values, size_t begin, size_t num) {
  EXPECT_LE(begin + num, values.size());
  return {values.begin() + begin, values.begin() + begin + num};
}

void expect_packed_prompt(const ReadBatch& batch, size_t begin, size_t num_prompt,
                          const std::string& name) {
  const std::vector<uint8_t> no_loss(num_prompt, 0);
  EXPECT_EQ(part(batch.values<uint8_t>("loss_mask"), begin, num_prompt), no_loss) << name;
  const std::vector<int32_t> no_version(num_prompt, -1);
  EXPECT_EQ(part(batch.values<int32_t>("weight_versions"), begin, num_prompt), no_version) << name;
  for (const std::string& column : value_columns(batch)) {
    for (const float value : part(batch.values<float>(column), begin, num_prompt)) {
      EXPECT_TRUE(std::isnan(value)) << name << ", " << column;
    }
  }
}

// A row of a [B, width] column.
std::vector<int64_t> row_of(const ReadBatch& batch, const std::string& name, size_t row) {
  const uint64_t width = batch.column(name).shape.at(1);
  return part(batch.values<int64_t>(name), row * width, width);
}

void expect_padded_row(const ReadBatch& batch, size_t b, const RebuiltSample& sample,
                       int64_t pad_id) {
  const uint64_t prompt_width = batch.column("prompts").shape.at(1);
  const uint64_t response_width = batch.column("responses").shape.at(1);
  std::vector<int64_t> prompt(prompt_width, pad_id);
  std::copy_backward(sample.prompt_ids.begin(), sample.prompt_ids.end(), prompt.end());
  std::vector<int64_t> response(response_width, pad_id);
  std::copy(sample.response_ids.begin(), sample.response_ids.end(), response.begin());
  EXPECT_EQ(row_of(batch, "prompts", b), prompt) << "row " << b;
  EXPECT_EQ(row_of(batch, "responses", b), response) << "row " << b;
  std::vector<int64_t> both = prompt;
  both.insert(both.end(), response.begin(), response.end());
  EXPECT_EQ(row_of(batch, "input_ids", b), both) << "row " << b;

  std::vector<int64_t> mask(both.size(), 0), positions(both.size(), 0);
  int64_t sum = 0;
  for (size_t c = 0; c < both.size(); ++c) {
    const size_t first = prompt_width - sample.prompt_ids.size();
    mask[c] = c >= first && c < prompt_width + sample.response_ids.size() ? 1 : 0;
    sum += mask[c];
    positions[c] = std::max<int64_t>(sum - 1, 0);
  }
  EXPECT_EQ(row_of(batch, "attention_mask", b), mask) << "row " << b;
  EXPECT_EQ(row_of(batch, "position_ids", b), positions) << "row " << b;
  std::vector<int64_t> response_mask(response_width, 0);
  std::fill_n(response_mask.begin(), sample.response_ids.size(), 1);
  EXPECT_EQ(row_of(batch, "response_mask", b), response_mask) << "row " << b;
}

std::vector<int32_t> expanded_versions(const Sample& sample) {
  std::vector<int32_t> versions(sample.response_ids.size(), -1);
  for (size_t t = 0; t < versions.size(); ++t) {
    for (const VersionSpan& span : sample.weight_versions) {
      if (span.first_token <= static_cast<int32_t>(t)) {
        versions[t] = static_cast<int32_t>(span.version);
      }
    }
  }
  return versions;
}

}  // namespace

std::vector<std::string> value_columns(const ReadBatch& batch) {
  std::vector<std::string> names;
  for (const std::string& name : batch.names) {
    const ReadColumn& column = batch.column(name);
    if (column.dtype == "<f4" && column.alignment == 1) names.push_back(name);
  }
  return names;
}

std::vector<RebuiltSample> rebuild_packed(const ReadBatch& batch) {
  std::vector<RebuiltSample> samples = sample_fields(batch);
  const auto input_ids = batch.values<int32_t>("input_ids");
  const auto position_ids = batch.values<int32_t>("position_ids");
  const auto segment_ids = batch.values<int32_t>("segment_ids");
  const auto loss_mask = batch.values<uint8_t>("loss_mask");
  const auto cu_seqlens = batch.values<int32_t>("cu_seqlens");
  EXPECT_EQ(cu_seqlens.size(), samples.size() + 1);
  EXPECT_EQ(cu_seqlens.at(0), 0);
  EXPECT_EQ(cu_seqlens.back(), static_cast<int32_t>(input_ids.size()));
  for (size_t s = 0; s < samples.size(); ++s) {
    RebuiltSample& sample = samples[s];
    const std::string name = "sample " + std::to_string(s);
    const auto begin = static_cast<size_t>(cu_seqlens[s]);
    const size_t num_prompt = sample.prompt_ids.size();
    const size_t num_response = sample.response_ids.size();
    const size_t response = begin + num_prompt;
    EXPECT_EQ(static_cast<size_t>(cu_seqlens.at(s + 1)), response + num_response) << name;
    for (size_t t = begin; t < response + num_response; ++t) {
      EXPECT_EQ(position_ids.at(t), static_cast<int32_t>(t - begin)) << name;
      EXPECT_EQ(segment_ids.at(t), static_cast<int32_t>(s)) << name;
    }
    expect_packed_prompt(batch, begin, num_prompt, name);
    const std::vector<uint8_t> all_loss(num_response, 1);
    EXPECT_EQ(part(loss_mask, response, num_response), all_loss) << name;
    sample.prompt_ids = part(input_ids, begin, num_prompt);
    sample.response_ids = part(input_ids, response, num_response);
    sample.weight_versions = part(batch.values<int32_t>("weight_versions"), response, num_response);
    for (const std::string& column : value_columns(batch)) {
      sample.values[column] = part(batch.values<float>(column), response, num_response);
    }
  }
  return samples;
}

std::vector<RebuiltSample> rebuild_padded(const ReadBatch& batch, int64_t pad_id) {
  std::vector<RebuiltSample> samples = sample_fields(batch);
  for (size_t b = 0; b < samples.size(); ++b) {
    RebuiltSample& sample = samples[b];
    const std::vector<int64_t> prompt = row_of(batch, "prompts", b);
    const std::vector<int64_t> response = row_of(batch, "responses", b);
    EXPECT_LE(sample.prompt_ids.size(), prompt.size());
    EXPECT_LE(sample.response_ids.size(), response.size());
    std::copy(prompt.end() - static_cast<int64_t>(sample.prompt_ids.size()), prompt.end(),
              sample.prompt_ids.begin());
    std::copy_n(response.begin(), sample.response_ids.size(), sample.response_ids.begin());
    expect_padded_row(batch, b, sample, pad_id);
    for (const std::string& column : value_columns(batch)) {
      const auto row = part(batch.values<float>(column), b * response.size(), response.size());
      sample.values[column] = part(row, 0, sample.response_ids.size());
      EXPECT_TRUE(std::all_of(row.begin() + static_cast<int64_t>(sample.response_ids.size()),
                              row.end(), [](float value) { return value == 0.0f; }))
          << column << ", row " << b;
    }
  }
  return samples;
}

void expect_same(const RebuiltSample& rebuilt, const Sample& sample,
                 const std::vector<float>& rollout_log_probs) {
  const std::string name = "request " + std::to_string(sample.key.request_id) + ", prompt " +
                           sample.key.prompt_id.text + ", sample " +
                           std::to_string(sample.key.sample_index);
  EXPECT_EQ(rebuilt.request_id, sample.key.request_id) << name;
  EXPECT_EQ(rebuilt.prompt_index, sample.key.prompt_index) << name;
  EXPECT_EQ(rebuilt.prompt_id, sample.key.prompt_id.text) << name;
  EXPECT_EQ(rebuilt.sample_index, sample.key.sample_index) << name;
  EXPECT_EQ(rebuilt.group_size, sample.key.group_size) << name;
  EXPECT_EQ(rebuilt.prompt_ids, *sample.prompt_ids) << name;
  EXPECT_EQ(rebuilt.response_ids, sample.response_ids) << name;
  EXPECT_EQ(rebuilt.finish_reason, static_cast<uint8_t>(sample.finish_reason)) << name;
  EXPECT_EQ(rebuilt.stop_token_id, sample.stop_token_id) << name;
  EXPECT_EQ(rebuilt.temperature, sample.temperature) << name;
  if (!rebuilt.weight_versions.empty()) {
    EXPECT_EQ(rebuilt.weight_versions, expanded_versions(sample)) << name;
  }
  const std::map<std::string, std::vector<float>> expected = {
      {"rollout_log_probs", rollout_log_probs},
      {"logprobs", sample.logprobs},
      {"scaled_logprobs", sample.scaled_logprobs},
      {"support_logmass", sample.support_logmass},
      {"entropy", sample.entropy}};
  for (const auto& [column, values] : rebuilt.values) {
    EXPECT_EQ(values, expected.at(column)) << name << ", " << column;
  }
}

}  // namespace rollpack::bridge::testing
