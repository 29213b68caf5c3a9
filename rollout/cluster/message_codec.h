// Messages between ranks as MessagePack maps, for the frames of trainer_bridge/wire. Both ends run
// the same binary (checked by its fingerprint), so the map is a plain picture of the structs.
#pragma once

#include <vector>

#include "rollout/cluster/messages.h"
#include "trainer_bridge/wire/frame.h"

namespace rollpack::rollout {

// Descriptors that a message carries are duplicated into the frame.
// Errors: resource_exhausted for what no frame holds; a sample or score of that size becomes its
// failure instead, with this error.
bridge::Frame encode(const Command& command);
bridge::Frame encode(const Event& event);

// Errors: data_loss naming the message.
Command decode_command(bridge::Frame frame);
Event decode_event(const bridge::Frame& frame);

}  // namespace rollpack::rollout
