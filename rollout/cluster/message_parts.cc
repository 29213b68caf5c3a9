#include "rollout/cluster/message_parts.h"

#include "kernels/base/error.h"

namespace rollpack::rollout {

using bridge::error_from_map;
using bridge::error_to_map;
using json = bridge::Json;

json encode_outcome(const bridge::Outcome& outcome) {
  return outcome ? error_to_map(*outcome) : json();
}

bridge::Outcome decode_outcome(const json& value) {
  if (value.is_null()) return std::nullopt;
  return error_from_map(value);
}

json encode_id(const bridge::PromptId& id) {
  return json::array({id.text, id.is_integer});
}

bridge::PromptId decode_id(const json& value) {
  return {.text = value.at(0), .is_integer = value.at(1)};
}

json encode_key(const bridge::SampleKey& key) {
  json map = {{"request_id", key.request_id},
              {"prompt_index", key.prompt_index},
              {"prompt_id", encode_id(key.prompt_id)},
              {"sample_index", key.sample_index},
              {"group_size", key.group_size}};
  if (key.node != 0) map["node"] = key.node;
  return map;
}

bridge::SampleKey decode_key(const json& map) {
  return {.request_id = integer<int64_t>(map.at("request_id")),
          .prompt_index = integer<int32_t>(map.at("prompt_index")),
          .prompt_id = decode_id(map.at("prompt_id")),
          .sample_index = integer<int32_t>(map.at("sample_index")),
          .group_size = integer<int32_t>(map.at("group_size")),
          .node = map.contains("node") ? integer<int32_t>(map["node"]) : 0};
}

json encode_tags(bridge::MemoryTags tags) {
  return {{"weights", tags.weights}, {"kv_cache", tags.kv_cache}};
}

bridge::MemoryTags decode_tags(const json& map) {
  return {.weights = map.at("weights"), .kv_cache = map.at("kv_cache")};
}

json encode_spans(const std::vector<bridge::VersionSpan>& spans) {
  json versions = json::array();
  for (const bridge::VersionSpan& span : spans) {
    versions.push_back(json::array({span.first_token, span.version}));
  }
  return versions;
}

std::vector<bridge::VersionSpan> decode_spans(const json& versions) {
  std::vector<bridge::VersionSpan> spans;
  for (const json& span : versions) {
    spans.push_back(
        {.first_token = integer<int32_t>(span.at(0)), .version = integer<int64_t>(span.at(1))});
  }
  return spans;
}

void fail_decoding(const json& map, const std::exception& cause) {
  throw Error({.code = ErrorCode::kDataLoss,
               .field = "rank message",
               .value = map.contains("type") ? bridge::quoted(map.at("type")) : "without a type",
               .message = cause.what()});
}

}  // namespace rollpack::rollout
