#include "trainer_bridge/layout/sample_columns.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::bridge {
namespace {

void copy_values(std::span<const float> values, std::span<float> out) {
  std::copy(values.begin(), values.end(), out.begin());
}

constexpr std::array<ResponseValues, 5> kOptional = {{
    {"logprobs", [](const Sample& s, std::span<float> out) { copy_values(s.logprobs, out); }},
    {"scaled_logprobs",
     [](const Sample& s, std::span<float> out) { copy_values(s.scaled_logprobs, out); }},
    {"support_logmass",
     [](const Sample& s, std::span<float> out) { copy_values(s.support_logmass, out); }},
    {"entropy", [](const Sample& s, std::span<float> out) { copy_values(s.entropy, out); }},
    {"ref_log_prob",
     [](const Sample& s, std::span<float> out) {
       if (s.ref_log_prob.empty()) std::ranges::fill(out, std::numeric_limits<float>::quiet_NaN());
       copy_values(s.ref_log_prob, out);
     }},
}};

struct LogprobsMode {
  std::string_view mode;
  ResponseValues values;
};

constexpr std::array<LogprobsMode, 2> kLogprobsModes = {{
    {"processed_logprobs",
     {"rollout_log_probs",
      [](const Sample& s, std::span<float> out) {
        for (size_t t = 0; t < out.size(); ++t)
          out[t] = s.scaled_logprobs[t] - s.support_logmass[t];
      }}},
    {"raw_logprobs",
     {"rollout_log_probs",
      [](const Sample& s, std::span<float> out) { copy_values(s.logprobs, out); }}},
}};

void check_version_spans(const Sample& sample) {
  const auto num_tokens = static_cast<int64_t>(sample.response_ids.size());
  int64_t previous = -1;
  for (const VersionSpan& span : sample.weight_versions) {
    const bool is_first = previous < 0;
    if ((is_first && span.first_token != 0) || span.first_token <= previous ||
        span.first_token >= num_tokens) {
      fail_invariant(fmt::format("{}: weight_versions names token {} after token {}, of {}",
                                 sample_name(sample), span.first_token, previous, num_tokens));
    }
    if (span.version < 0 || span.version > std::numeric_limits<int32_t>::max()) {
      throw Error({.code = ErrorCode::kUnsupported,
                   .field = "weight_versions",
                   .value = std::to_string(span.version),
                   .origin = sample_name(sample),
                   .allowed = "0 to 2147483647, what the batch's column holds"});
    }
    previous = span.first_token;
  }
  if (num_tokens > 0 && sample.weight_versions.empty()) {
    fail_invariant(sample_name(sample) + ": weight_versions is empty, response_ids is not");
  }
}

// One entry a sample.
template <class T, class Value>
Column sample_column(std::string name, const SampleList& samples, Value value) {
  return make_column<T>(
      std::move(name), Alignment::kNone, {samples->size()}, [samples, value](std::span<T> out) {
        std::transform(samples->begin(), samples->end(), out.begin(),
                       [&](const Sample* s) { return static_cast<T>(value(*s)); });
      });
}

void append_prompt_ids(const SampleList& samples, std::vector<Column>& columns) {
  uint64_t num_bytes = 0;
  for (const Sample* sample : *samples) num_bytes += sample->key.prompt_id.text.size();
  columns.push_back(make_column<uint8_t>(
      "prompt_id_bytes", Alignment::kNone, {num_bytes}, [samples](std::span<uint8_t> out) {
        auto end = out.begin();
        for (const Sample* s : *samples) {
          end = std::copy(s->key.prompt_id.text.begin(), s->key.prompt_id.text.end(), end);
        }
      }));
  columns.push_back(make_column<int32_t>("prompt_id_starts", Alignment::kNone,
                                         {samples->size() + 1}, [samples](std::span<int32_t> out) {
                                           size_t start = 0;
                                           for (size_t s = 0; s < samples->size(); ++s) {
                                             out[s] = static_cast<int32_t>(start);
                                             start += (*samples)[s]->key.prompt_id.text.size();
                                           }
                                           out.back() = static_cast<int32_t>(start);
                                         }));
}

}  // namespace

std::string sample_name(const Sample& sample) {
  return fmt::format("request {}, prompt {} ({}), sample {}", sample.key.request_id,
                     sample.key.prompt_index, sample.key.prompt_id.text, sample.key.sample_index);
}

void check_sample(const Sample& sample) {
  if (sample.prompt_ids == nullptr) fail_invariant(sample_name(sample) + ": prompt_ids is null");
  const size_t num_tokens = sample.response_ids.size();
  const auto check_count = [&](std::string_view name, size_t count) {
    if (count == num_tokens) return;
    fail_invariant(fmt::format("{}: {} has {} entries, response_ids {}", sample_name(sample), name,
                               count, num_tokens));
  };
  check_count("logprobs", sample.logprobs.size());
  check_count("scaled_logprobs", sample.scaled_logprobs.size());
  check_count("support_logmass", sample.support_logmass.size());
  if (!sample.entropy.empty()) check_count("entropy", sample.entropy.size());
  if (!sample.ref_log_prob.empty()) check_count("ref_log_prob", sample.ref_log_prob.size());
  check_version_spans(sample);
}

void append_sample_columns(const SampleList& samples, std::vector<Column>& columns) {
  columns.push_back(sample_column<int64_t>("request_id", samples,
                                           [](const Sample& s) { return s.key.request_id; }));
  columns.push_back(sample_column<int32_t>("prompt_index", samples,
                                           [](const Sample& s) { return s.key.prompt_index; }));
  append_prompt_ids(samples, columns);
  columns.push_back(sample_column<int32_t>("sample_index", samples,
                                           [](const Sample& s) { return s.key.sample_index; }));
  columns.push_back(sample_column<int32_t>("group_size", samples,
                                           [](const Sample& s) { return s.key.group_size; }));
  columns.push_back(sample_column<int32_t>("prompt_lens", samples,
                                           [](const Sample& s) { return s.prompt_ids->size(); }));
  columns.push_back(sample_column<int32_t>("response_lens", samples,
                                           [](const Sample& s) { return s.response_ids.size(); }));
  columns.push_back(sample_column<uint8_t>("finish_reason", samples,
                                           [](const Sample& s) { return s.finish_reason; }));
  columns.push_back(sample_column<int32_t>("stop_token_id", samples,
                                           [](const Sample& s) { return s.stop_token_id; }));
  columns.push_back(
      sample_column<float>("temperature", samples, [](const Sample& s) { return s.temperature; }));
}

std::span<const ResponseValues> optional_response_values() {
  return kOptional;
}

std::vector<ResponseValues> response_values(std::string_view logprobs_mode,
                                            std::span<const std::string> columns) {
  std::vector<ResponseValues> values;
  for (const LogprobsMode& known : kLogprobsModes) {
    if (known.mode == logprobs_mode) values.push_back(known.values);
  }
  for (const ResponseValues& known : kOptional) {
    if (std::find(columns.begin(), columns.end(), known.name) != columns.end()) {
      values.push_back(known);
    }
  }
  return values;
}

std::vector<std::string_view> logprobs_modes() {
  std::vector<std::string_view> names;
  names.reserve(kLogprobsModes.size());
  for (const LogprobsMode& known : kLogprobsModes) names.push_back(known.mode);
  return names;
}

}  // namespace rollpack::bridge
