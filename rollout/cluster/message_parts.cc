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
  return {{"request_id", key.request_id},
          {"prompt_index", key.prompt_index},
          {"prompt_id", encode_id(key.prompt_id)},
          {"sample_index", key.sample_index},
          {"group_size", key.group_size}};
}

bridge::SampleKey decode_key(const json& map) {
  return {.request_id = integer<int64_t>(map.at("request_id")),
          .prompt_index = integer<int32_t>(map.at("prompt_index")),
          .prompt_id = decode_id(map.at("prompt_id")),
          .sample_index = integer<int32_t>(map.at("sample_index")),
          .group_size = integer<int32_t>(map.at("group_size"))};
}

void fail_decoding(const json& map, const std::exception& cause) {
  throw Error({.code = ErrorCode::kDataLoss,
               .field = "rank message",
               .value = map.contains("type") ? bridge::quoted(map.at("type")) : "without a type",
               .message = cause.what()});
}

}  // namespace rollpack::rollout
