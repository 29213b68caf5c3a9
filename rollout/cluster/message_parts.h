// What commands and events have in common, as MessagePack values: ids, keys, outcomes, lists.
#pragma once

#include <cstring>
#include <exception>
#include <vector>

#include "trainer_bridge/contract/rollout_service.h"
#include "trainer_bridge/contract/sample.h"
#include "trainer_bridge/wire/message.h"

namespace rollpack::rollout {

// Numbers travel as their bytes; the other end is this program on this machine.
template <class T>
std::vector<T> from_bin(const bridge::Json& value) {
  const auto& bytes = value.get_binary();
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

bridge::Json encode_outcome(const bridge::Outcome& outcome);
bridge::Outcome decode_outcome(const bridge::Json& value);
bridge::Json encode_id(const bridge::PromptId& id);
bridge::PromptId decode_id(const bridge::Json& value);
bridge::Json encode_key(const bridge::SampleKey& key);
bridge::SampleKey decode_key(const bridge::Json& map);

// Errors: data_loss naming the type that `map` says it has.
[[noreturn]] void fail_decoding(const bridge::Json& map, const std::exception& cause);

}  // namespace rollpack::rollout
