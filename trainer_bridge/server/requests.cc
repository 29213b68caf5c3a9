#include "trainer_bridge/server/requests.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>

namespace rollpack::bridge {
namespace {

constexpr int64_t kMaxI32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxDpSize = 65536;
constexpr size_t kMaxProbeWords = 16;
// A wait without end by another name; keeps deadlines away from the clock's limit.
constexpr int64_t kMaxTimeoutMs = int64_t{365} * 24 * 3600 * 1000;

PromptId id_from(const Fields& fields, std::string_view key, const Json& value) {
  if (value.is_string()) return {value.get<std::string>(), false};
  if (value.is_number_integer()) return {value.dump(), true};
  fields.refuse(key, value, "text or an integer");
}

// A number as f32, refused where f32 has no finite value for it.
std::optional<float> read_f32(Fields& fields, std::string_view key) {
  const auto number = fields.optional_number(key);
  if (!number) return std::nullopt;
  if (*number > std::numeric_limits<float>::max() ||
      *number < std::numeric_limits<float>::lowest()) {
    fields.refuse(key, *number, "a number that fits 32 bits");
  }
  return static_cast<float>(*number);
}

SamplingOverrides read_sampling(const Json* map, const std::string& path) {
  SamplingOverrides sampling;
  if (map == nullptr) return sampling;
  Fields fields(*map, path, "submit");
  sampling.temperature = read_f32(fields, "temperature");
  sampling.top_k = fields.optional_i32("top_k");
  sampling.top_p = read_f32(fields, "top_p");
  sampling.min_p = read_f32(fields, "min_p");
  sampling.seed = fields.optional_u64("seed");
  sampling.response_length = fields.optional_i32("response_length");
  sampling.min_tokens = fields.optional_i32("min_tokens");
  sampling.stop_token_ids = fields.optional_i32s("stop_token_ids");
  sampling.ignore_eos = fields.optional_boolean("ignore_eos");
  fields.finish();
  return sampling;
}

PromptRequest read_prompt(const Json& map, size_t index) {
  Fields fields(map, fmt::format("prompts[{}]", index), "submit");
  PromptRequest prompt;
  prompt.origin = fmt::format("submit prompts[{}]", index);
  if (const Json* id = fields.optional_any("prompt_id")) {
    prompt.prompt_id = id_from(fields, "prompt_id", *id);
  }
  prompt.input_ids = fields.i32s("input_ids");
  prompt.n = fields.optional_i32("n");
  prompt.sampling = read_sampling(fields.optional_map("sampling"), fields.path_of("sampling"));
  fields.finish();
  return prompt;
}

ScoreSequence read_sequence(const Json& map, size_t index) {
  Fields fields(map, fmt::format("sequences[{}]", index), "score");
  ScoreSequence sequence;
  sequence.origin = fmt::format("score sequences[{}]", index);
  sequence.id = id_from(fields, "id", fields.any("id"));
  sequence.input_ids = fields.i32s("input_ids");
  sequence.response_ids = fields.i32s("response_ids");
  sequence.temperature = read_f32(fields, "temperature").value_or(1.0f);
  fields.finish();
  return sequence;
}

MemoryProbe read_probe(const Json& map) {
  Fields fields(map, "probe", "hello");
  MemoryProbe probe{.address = fields.u64("address"), .value = fields.i32s("value")};
  fields.finish();
  if (probe.value.empty() || probe.value.size() > kMaxProbeWords) {
    fields.refuse("value", probe.value.size(),
                  fmt::format("1 to {} words of 4 bytes", kMaxProbeWords));
  }
  return probe;
}

}  // namespace

std::vector<PromptRequest> read_prompts(Fields& fields) {
  const Json& maps = fields.array("prompts");
  fields.finish();
  if (maps.empty()) fields.refuse("prompts", maps, "at least one prompt");
  std::vector<PromptRequest> prompts;
  prompts.reserve(maps.size());
  for (size_t i = 0; i < maps.size(); ++i) prompts.push_back(read_prompt(maps[i], i));
  return prompts;
}

std::vector<ScoreSequence> read_sequences(Fields& fields) {
  const Json& maps = fields.array("sequences");
  fields.finish();
  std::vector<ScoreSequence> sequences;
  sequences.reserve(maps.size());
  for (size_t i = 0; i < maps.size(); ++i) sequences.push_back(read_sequence(maps[i], i));
  return sequences;
}

InFlight read_in_flight(Fields& fields) {
  constexpr std::array kModes = {InFlight::kKeep, InFlight::kWait, InFlight::kAbort};
  return kModes[fields.one_of("mode", {"keep", "wait", "abort"})];
}

MemoryTags read_tags(Fields& fields) {
  const Json* const names = fields.optional_any("tags");
  if (names == nullptr) return {.weights = true, .kv_cache = true};
  const auto refuse = [&] {
    fields.refuse("tags", *names, "a list of \"weights\" and \"kv_cache\", or nil for both");
  };
  if (!names->is_array() || names->empty()) refuse();
  MemoryTags tags;
  for (const Json& name : *names) {
    if (name == "weights") {
      tags.weights = true;
    } else if (name == "kv_cache") {
      tags.kv_cache = true;
    } else {
      fields.refuse("tags", name, "a list of \"weights\" and \"kv_cache\", or nil for both");
    }
  }
  return tags;
}

HelloRequest read_hello(Fields& fields) {
  HelloRequest request;
  request.protocol_version = fields.integer("protocol_version", 0, kMaxI64);
  fields.text("client");
  const auto size = fields.optional_integer("dp_size", 1, kMaxDpSize);
  const auto rank = fields.optional_integer("dp_rank", 0, size.value_or(kMaxDpSize) - 1);
  const bool keeps_groups_whole = fields.optional_boolean("whole_groups").value_or(false);
  if (const Json* const probe = fields.optional_map("probe")) request.probe = read_probe(*probe);
  fields.finish();
  if (size.has_value() != rank.has_value()) {
    fields.refuse(size ? "dp_rank" : "dp_size", nullptr, "dp_rank and dp_size together");
  }
  if (size) {
    request.member = DpMember{.rank = static_cast<int32_t>(*rank),
                              .size = static_cast<int32_t>(*size),
                              .keeps_groups_whole = keeps_groups_whole};
  }
  return request;
}

NextBatchRequest read_next_batch(Fields& fields) {
  constexpr std::array kOrders = {GroupOrder::kCompletion, GroupOrder::kCanonical};
  NextBatchRequest request;
  BatchWish& wish = request.wish;
  wish.num_groups = fields.optional_integer("num_groups", 1, kMaxI64);
  wish.min_ready = fields.optional_integer("min_ready", 1, wish.num_groups.value_or(kMaxI64));
  if (fields.optional_any("order") != nullptr) {
    wish.order = kOrders[fields.one_of("order", {"completion", "canonical"})];
  }
  request.timeout_ms = std::min(fields.integer("timeout_ms", 0, kMaxI64), kMaxTimeoutMs);
  fields.finish();
  return request;
}

ReleaseRequest read_release(Fields& fields) {
  ReleaseRequest request;
  const auto slot = fields.optional_integer("slot", 0, kMaxI32);
  const uint64_t generation = fields.u64("generation");
  if (slot) request.lease = SlotLease{static_cast<int32_t>(*slot), generation};
  request.batch_seq = fields.u64("batch_seq");
  fields.finish();
  return request;
}

ProbsDiff read_probs_diff(Fields& fields) {
  const auto read = [&fields](std::string_view key, double high, const char* allowed) {
    const double value = fields.number(key);
    if (value < 0 || value > high) fields.refuse(key, value, allowed);
    return value;
  };
  constexpr const char* kOfProbabilities = "a number from 0 to 1";
  const ProbsDiff diff{
      .mean = read("mean", 1, kOfProbabilities),
      .max = read("max", 1, kOfProbabilities),
      .std = read("std", 1, kOfProbabilities),
      .k3_kl = read("k3_kl", std::numeric_limits<double>::max(), "a finite number of at least 0")};
  fields.finish();
  return diff;
}

}  // namespace rollpack::bridge
