#include "trainer_bridge/wire/message.h"

#include <fmt/format.h>

#include <bit>
#include <cstring>

#include "trainer_bridge/wire/fields.h"
#include "trainer_bridge/wire/frame.h"
#include "trainer_bridge/wire/message_scan.h"
#include "trainer_bridge/wire/utf8.h"

namespace rollpack::bridge {
namespace {

static_assert(std::endian::native == std::endian::little);

template <class T>
Json bin_of(std::span<const T> values) {
  Json::binary_t::container_type bytes(values.size_bytes());
  if (!values.empty()) std::memcpy(bytes.data(), values.data(), values.size_bytes());
  return Json::binary(std::move(bytes));
}

std::string as_utf8(std::string text) {
  if (is_utf8(text)) return text;
  for (char& c : text) {
    if (static_cast<uint8_t>(c) >= 0x80) c = '?';
  }
  return text;
}

}  // namespace

Json decode_message(std::span<const uint8_t> bytes) {
  scan_message(bytes);
  return Json::from_msgpack(bytes.begin(), bytes.end());
}

std::vector<uint8_t> encode_message(const Json& map) {
  std::vector<uint8_t> bytes = Json::to_msgpack(map);
  if (bytes.size() > kMaxFrameBytes) {
    throw Error({.code = ErrorCode::kResourceExhausted,
                 .field = "message",
                 .value = fmt::format("{} bytes", bytes.size()),
                 .allowed = fmt::format("at most {} bytes a frame", kMaxFrameBytes),
                 .message = "ask for less in one request"});
  }
  return bytes;
}

Json error_to_map(const ErrorInfo& info) {
  return {{"code", error_code_name(info.code)}, {"field", as_utf8(info.field)},
          {"value", as_utf8(info.value)},       {"origin", as_utf8(info.origin)},
          {"allowed", as_utf8(info.allowed)},   {"message", as_utf8(info.message)}};
}

ErrorInfo error_from_map(const Json& map) {
  Fields fields(map, "error", "peer");
  ErrorInfo info;
  info.code = error_code_from_name(fields.text("code"));
  info.field = fields.text("field");
  info.value = fields.text("value");
  info.origin = fields.text("origin");
  info.allowed = fields.text("allowed");
  info.message = fields.text("message");
  fields.finish();
  return info;
}

Json to_bin(std::span<const int32_t> values) {
  return bin_of(values);
}
Json to_bin(std::span<const float> values) {
  return bin_of(values);
}

}  // namespace rollpack::bridge
