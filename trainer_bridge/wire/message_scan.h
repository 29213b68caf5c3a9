// What a MessagePack message must satisfy before anything is built from it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace rollpack::bridge {

inline constexpr int kMaxMessageDepth = 16;
// A decoded value costs some 16 bytes and a map entry 100 and more, so a frame of one-byte values
// could ask for gigabytes; this many of them stay below 128 MiB.
inline constexpr size_t kMaxMessageValues = size_t{1} << 20;

// Checks that `bytes` hold exactly one map, without recursion and without allocating by a claimed
// length: nesting at most kMaxMessageDepth, every length inside the frame, keys that are text and
// never repeated in one map, valid UTF-8, no extension types, nothing behind the map.
// Errors: invalid_argument naming what was found and at which byte.
// Source: msgpack specification, github.com/msgpack/msgpack, spec.md.
void scan_message(std::span<const uint8_t> bytes);

}  // namespace rollpack::bridge
