// First bytes of frames about a node's bridge. Messages between ranks begin with a MessagePack map,
// memory with 0xC1.
#pragma once

#include <cstdint>

namespace rollpack::rollout {

inline constexpr uint8_t kNodeMark = 0xC0;    // nil; one of node_messages.h follows
inline constexpr uint8_t kSampleMark = 0xC2;  // false; a sample of sample_frame.h follows

}  // namespace rollpack::rollout
