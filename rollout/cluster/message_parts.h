// What commands and events have in common, as MessagePack values: ids, keys, outcomes, lists.
#pragma once

#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/contract/sample.h"
#include "trainer_bridge/wire/fields.h"
#include "trainer_bridge/wire/message.h"

namespace rollpack::rollout {

// Reading: std::exception, whose text fail_decoding() passes on, for a value that is none. The
// other end is this program, but what a broken one sends must not become a wild read or another
// number.

// Numbers travel as their bytes, in this machine's order.
template <class T>
std::vector<T> from_bin(const bridge::Json& value) {
  const auto& bytes = value.get_binary();
  if (bytes.size() % sizeof(T) != 0) throw std::length_error("a number cut in a list of them");
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

// An integer of T's range; nlohmann would convert floats and narrow.
template <class T>
T integer(const bridge::Json& value) {
  if (value.is_number_unsigned() && std::in_range<T>(value.get<uint64_t>())) return value.get<T>();
  if (value.is_number_integer() && !value.is_number_unsigned() &&
      std::in_range<T>(value.get<int64_t>())) {
    return value.get<T>();
  }
  throw std::out_of_range("expected an integer in range, found " + bridge::quoted(value));
}

// An enumerator from 0 to `last`.
template <class T>
T enumerator(const bridge::Json& value, T last) {
  const auto number = integer<uint8_t>(value);
  if (number <= static_cast<uint8_t>(last)) return static_cast<T>(number);
  throw std::out_of_range("expected an enumerator, found " + bridge::quoted(value));
}

bridge::Json encode_outcome(const bridge::Outcome& outcome);
bridge::Outcome decode_outcome(const bridge::Json& value);
bridge::Json encode_id(const bridge::PromptId& id);
bridge::PromptId decode_id(const bridge::Json& value);
bridge::Json encode_key(const bridge::SampleKey& key);
bridge::SampleKey decode_key(const bridge::Json& map);
bridge::Json encode_tags(bridge::MemoryTags tags);
bridge::MemoryTags decode_tags(const bridge::Json& map);
bridge::Json encode_spans(const std::vector<bridge::VersionSpan>& spans);
std::vector<bridge::VersionSpan> decode_spans(const bridge::Json& versions);

// Errors: data_loss naming the type that `map` says it has.
[[noreturn]] void fail_decoding(const bridge::Json& map, const std::exception& cause);

}  // namespace rollpack::rollout
