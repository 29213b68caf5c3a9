#include "rollout/jsonl/writers.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <iterator>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/base/error.h"
#include "rollout/jsonl/strict_json.h"

namespace rollpack::rollout {
namespace {

constexpr std::string_view kFinishReasons[] = {"stop", "length", "abort"};

// Bytes that are not UTF-8 (of a value quoted in an error) become U+FFFD.
void put_string(std::string& out, const std::string& text) {
  out += Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
}

void put_id(std::string& out, const bridge::PromptId& id) {
  if (id.is_integer) {
    out += id.text;
  } else {
    put_string(out, id.text);
  }
}

void put_float(std::string& out, float value) {
  char digits[32];
  const auto end = std::to_chars(digits, std::end(digits), value).ptr;
  out.append(digits, end);
}

void put_key(std::string& out, std::string_view key) {
  fmt::format_to(std::back_inserter(out), ",\"{}\":", key);
}

// `owner` names sample or sequence for errors.
void put_floats(std::string& out, std::string_view key, std::span<const float> values,
                size_t num_tokens, const std::string& owner) {
  if (values.size() != num_tokens) {
    fail_invariant(fmt::format("{} of {} has {} entries for {} tokens", key, owner, values.size(),
                               num_tokens));
  }
  put_key(out, key);
  out += '[';
  for (size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) {
      throw Error({.code = ErrorCode::kNonFinite,
                   .field = fmt::format("{}[{}]", key, i),
                   .value = fmt::format("{}", values[i]),
                   .origin = owner,
                   .allowed = "a finite number"});
    }
    if (i > 0) out += ',';
    put_float(out, values[i]);
  }
  out += ']';
}

void put_weight_versions(std::string& out, const std::vector<bridge::VersionSpan>& spans) {
  put_key(out, "weight_version");
  out += std::to_string(spans.empty() ? -1 : spans.front().version);
  if (spans.size() < 2) return;
  put_key(out, "weight_versions");
  for (size_t i = 0; i < spans.size(); ++i) {
    fmt::format_to(std::back_inserter(out), "{}[{},{}]", i == 0 ? '[' : ',', spans[i].first_token,
                   spans[i].version);
  }
  out += ']';
}

std::string begin_sample(const bridge::SampleKey& key) {
  std::string out = "{\"prompt_id\":";
  put_id(out, key.prompt_id);
  put_key(out, "sample_index");
  out += std::to_string(key.sample_index);
  return out;
}

}  // namespace

std::string sample_line(const bridge::Sample& sample) {
  const std::string owner =
      fmt::format("prompt_id {}, sample {}", sample.key.prompt_id.text, sample.key.sample_index);
  const size_t num_tokens = sample.response_ids.size();
  std::string out = begin_sample(sample.key);
  put_key(out, "response_ids");
  fmt::format_to(std::back_inserter(out), "[{}]", fmt::join(sample.response_ids, ","));
  put_floats(out, "logprobs", sample.logprobs, num_tokens, owner);
  put_floats(out, "scaled_logprobs", sample.scaled_logprobs, num_tokens, owner);
  put_floats(out, "support_logmass", sample.support_logmass, num_tokens, owner);
  put_key(out, "finish_reason");
  fmt::format_to(std::back_inserter(out), "\"{}\"",
                 kFinishReasons[static_cast<size_t>(sample.finish_reason)]);
  put_key(out, "stop_token_id");
  out += std::to_string(sample.stop_token_id);
  put_weight_versions(out, sample.weight_versions);
  double cumulative = 0;
  for (const float logprob : sample.logprobs) cumulative += logprob;
  put_key(out, "cumulative_logprob");
  put_float(out, static_cast<float>(cumulative));
  return out + "}\n";
}

std::string failed_line(const bridge::FailedSample& sample) {
  const ErrorInfo& error = sample.error;
  std::string out = begin_sample(sample.key);
  put_key(out, "error");
  fmt::format_to(std::back_inserter(out), "{{\"code\":\"{}\"", error_code_name(error.code));
  const std::pair<std::string_view, const std::string*> parts[] = {{"field", &error.field},
                                                                   {"value", &error.value},
                                                                   {"origin", &error.origin},
                                                                   {"allowed", &error.allowed},
                                                                   {"message", &error.message}};
  for (const auto& [key, text] : parts) {
    put_key(out, key);
    put_string(out, *text);
  }
  return out + "}}\n";
}

std::string scored_line(const bridge::ScoredSequence& sequence) {
  const std::string owner = fmt::format("sequence {}", sequence.id.text);
  std::string out = "{\"id\":";
  put_id(out, sequence.id);
  const size_t num_tokens = sequence.logprobs.size();
  put_floats(out, "logprobs", sequence.logprobs, num_tokens, owner);
  put_floats(out, "scaled_logprobs", sequence.scaled_logprobs, num_tokens, owner);
  put_floats(out, "entropy", sequence.entropy, num_tokens, owner);
  return out + "}\n";
}

}  // namespace rollpack::rollout
