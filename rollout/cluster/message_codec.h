// Messages between ranks as MessagePack maps, for the frames of trainer_bridge/wire. Both ends run the
// same binary (checked by its fingerprint), so the map is a plain picture of the structs.
#pragma once

#include <vector>

#include <nlohmann/json.hpp>

#include "rollout/cluster/messages.h"

namespace rollpack::rollout {

struct EncodedMessage {
  nlohmann::json map;
  std::vector<int> fds;  // ride on the frame; owned by whoever owned them
};

EncodedMessage encode(const Command& command);
EncodedMessage encode(const Event& event);

// `fds` came with the frame and pass to the message. Errors: data_loss naming the message.
Command decode_command(const nlohmann::json& map, const std::vector<int>& fds);
Event decode_event(const nlohmann::json& map, const std::vector<int>& fds);

}  // namespace rollpack::rollout
