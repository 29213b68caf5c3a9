#include "rollout/jsonl/readers.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string_view>
#include <unordered_map>

#include "kernels/base/error.h"
#include "rollout/jsonl/strict_json.h"
#include "rollout/jsonl/text_file.h"
#include "rollout/sampling/temperature.h"

namespace rollpack::rollout {
namespace {

constexpr JsonLimits kLineLimits = {.max_bytes = size_t{64} << 20, .max_depth = 4};
constexpr int32_t kMaxTokenId = std::numeric_limits<int32_t>::max();
constexpr int32_t kMaxSamples = 65536;
constexpr int32_t kMaxTokens = 1 << 24;  // of one prompt or response in a workload
constexpr size_t kMaxIdBytes = 4096;

// One line as an object whose keys are all known.
class Line {
 public:
  Line(Json object, std::string origin, std::string prefix = {})
      : object_(std::move(object)), origin_(std::move(origin)), prefix_(std::move(prefix)) {}

  // The value of `key`, or nullptr where it is absent.
  const Json* find(std::string_view key) const {
    const auto found = object_.find(key);
    return found == object_.end() ? nullptr : &*found;
  }
  const Json& require(std::string_view key) const {
    if (const Json* value = find(key)) return *value;
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = place(key).field,
                 .origin = origin_,
                 .message = "this key is missing"});
  }
  JsonPlace place(std::string_view key) const { return {prefix_ + std::string(key), origin_}; }
  const std::string& origin() const { return origin_; }

  void refuse_other_keys(std::initializer_list<std::string_view> known) const {
    for (const auto& [key, value] : object_.items()) {
      if (std::find(known.begin(), known.end(), key) != known.end()) continue;
      const bool is_text_stop = key == "stop" || key == "stop_strings";
      fail_json(value, place(key), fmt::format("only the keys {}", fmt::join(known, ", ")),
                is_text_stop ? "stop strings are refused: text stays with the caller; use "
                               "stop_token_ids"
                             : "");
    }
  }

 private:
  Json object_;
  std::string origin_;
  std::string prefix_;
};

// Calls take(Line, 0-based line number) for every line that is not blank.
template <class Take>
void for_each_line(const std::string& path, std::string_view field, Take&& take) {
  LineReader reader(path, field);
  while (const auto text = reader.next()) {
    if (text->find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string origin = reader.origin();
    Json object = parse_json(*text, origin, kLineLimits);
    json_object(object, {"line", origin});
    take(Line(std::move(object), origin), reader.line_number() - 1);
  }
}

bridge::PromptId read_id(const Line& line, std::string_view key, int64_t line_index) {
  const Json* value = line.find(key);
  if (value == nullptr) return {.text = std::to_string(line_index), .is_integer = true};
  if (value->is_number_unsigned()) {
    return {.text = std::to_string(value->get<uint64_t>()), .is_integer = true};
  }
  if (value->is_number_integer()) {
    return {.text = std::to_string(value->get<int64_t>()), .is_integer = true};
  }
  if (!value->is_string()) fail_json(*value, line.place(key), "a string or an integer");
  std::string text = value->get<std::string>();
  if (text.size() > kMaxIdBytes) {
    fail_json(*value, line.place(key), fmt::format("at most {} bytes", kMaxIdBytes),
              fmt::format("this has {}", text.size()));
  }
  return {.text = std::move(text)};
}

std::vector<int32_t> read_token_ids(const Line& line, std::string_view key) {
  return json_int32_list(line.require(key), line.place(key), 0, kMaxTokenId);
}

std::vector<int32_t> read_prompt_tokens(const Line& line) {
  std::vector<int32_t> ids = read_token_ids(line, "input_ids");
  if (ids.empty()) fail_json(Json::array(), line.place("input_ids"), "at least one token id");
  return ids;
}

float read_f32(const Json& value, const JsonPlace& place) {
  const auto number = static_cast<float>(json_number(value, place));
  if (!std::isfinite(number)) fail_json(value, place, "a number that fits 32-bit floats");
  return number;
}

bridge::SamplingOverrides read_sampling(const Json& value, const std::string& origin) {
  const Line keys(json_object(value, {"sampling", origin}), origin, "sampling.");
  keys.refuse_other_keys({"temperature", "top_k", "top_p", "min_p", "seed", "response_length",
                          "min_tokens", "stop_token_ids", "ignore_eos"});
  bridge::SamplingOverrides sampling;
  const auto real = [&](std::string_view key, std::optional<float>& out) {
    if (const Json* found = keys.find(key)) out = read_f32(*found, keys.place(key));
  };
  const auto integer = [&](std::string_view key, std::optional<int32_t>& out) {
    const Json* found = keys.find(key);
    if (found == nullptr) return;
    out = static_cast<int32_t>(json_integer(*found, keys.place(key),
                                            std::numeric_limits<int32_t>::min(),
                                            std::numeric_limits<int32_t>::max()));
  };
  real("temperature", sampling.temperature);
  real("top_p", sampling.top_p);
  real("min_p", sampling.min_p);
  if (const Json* top_k = keys.find("top_k"); top_k != nullptr && top_k->is_null()) {
    sampling.top_k = -1;  // off, as TRL writes it
  } else {
    integer("top_k", sampling.top_k);
  }
  integer("response_length", sampling.response_length);
  integer("min_tokens", sampling.min_tokens);
  if (const Json* seed = keys.find("seed"))
    sampling.seed = json_unsigned(*seed, keys.place("seed"));
  if (const Json* stops = keys.find("stop_token_ids")) {
    sampling.stop_token_ids = json_int32_list(*stops, keys.place("stop_token_ids"), 0, kMaxTokenId);
  }
  if (const Json* ignore = keys.find("ignore_eos")) {
    sampling.ignore_eos = json_bool(*ignore, keys.place("ignore_eos"));
  }
  return sampling;
}

}  // namespace

std::vector<bridge::PromptRequest> read_prompts(const std::string& path) {
  std::vector<bridge::PromptRequest> prompts;
  std::unordered_map<std::string, std::string> origin_of_id;
  for_each_line(path, "--prompts", [&](const Line& line, int64_t index) {
    line.refuse_other_keys({"prompt_id", "input_ids", "n", "sampling"});
    bridge::PromptRequest prompt;
    prompt.origin = line.origin();
    prompt.prompt_id = read_id(line, "prompt_id", index);
    const auto [first, is_new] = origin_of_id.emplace(prompt.prompt_id->text, prompt.origin);
    if (!is_new) {
      throw Error({.code = ErrorCode::kInvalidArgument,
                   .field = "prompt_id",
                   .value = prompt.prompt_id->text,
                   .origin = prompt.origin,
                   .allowed = "each prompt_id once (7 and \"7\" are one)",
                   .message = fmt::format("it stands at {} already", first->second)});
    }
    prompt.input_ids = read_prompt_tokens(line);
    if (const Json* n = line.find("n")) {
      prompt.n = static_cast<int32_t>(json_integer(*n, line.place("n"), 1, kMaxSamples));
    }
    if (const Json* sampling = line.find("sampling")) {
      prompt.sampling = read_sampling(*sampling, line.origin());
    }
    prompts.push_back(std::move(prompt));
  });
  return prompts;
}

std::vector<bridge::ScoreSequence> read_sequences(const std::string& path) {
  std::vector<bridge::ScoreSequence> sequences;
  for_each_line(path, "--sequences", [&](const Line& line, int64_t index) {
    line.refuse_other_keys({"id", "input_ids", "response_ids", "temperature"});
    bridge::ScoreSequence sequence;
    sequence.origin = line.origin();
    sequence.id = read_id(line, "id", index);
    sequence.input_ids = read_prompt_tokens(line);
    sequence.response_ids = read_token_ids(line, "response_ids");
    if (const Json* temperature = line.find("temperature")) {
      const JsonPlace place = line.place("temperature");
      sequence.temperature = read_f32(*temperature, place);
      if (!is_temperature(sequence.temperature)) {
        fail_json(*temperature, place, std::string(kTemperatureAllowed));
      }
    }
    sequences.push_back(std::move(sequence));
  });
  return sequences;
}

std::vector<WorkloadGroup> read_workload(const std::string& path) {
  std::vector<WorkloadGroup> groups;
  for_each_line(path, "--workload", [&](const Line& line, int64_t index) {
    line.refuse_other_keys({"prompt_id", "input_ids", "prompt_tokens", "response_tokens"});
    WorkloadGroup group;
    group.prompt_id = read_id(line, "prompt_id", index);
    const Json* num_tokens = line.find("prompt_tokens");
    if ((num_tokens != nullptr) == (line.find("input_ids") != nullptr)) {
      throw Error({.code = ErrorCode::kInvalidArgument,
                   .field = "input_ids",
                   .origin = line.origin(),
                   .allowed = "exactly one of input_ids and prompt_tokens"});
    }
    if (num_tokens != nullptr) {
      group.prompt_tokens = static_cast<int32_t>(
          json_integer(*num_tokens, line.place("prompt_tokens"), 1, kMaxTokens));
    } else {
      group.input_ids = read_prompt_tokens(line);
      group.prompt_tokens = static_cast<int32_t>(group.input_ids.size());
    }
    const JsonPlace lengths = line.place("response_tokens");
    group.response_tokens =
        json_int32_list(line.require("response_tokens"), lengths, 1, kMaxTokens);
    if (group.response_tokens.empty()) fail_json(Json::array(), lengths, "at least one length");
    groups.push_back(std::move(group));
  });
  return groups;
}

}  // namespace rollpack::rollout
