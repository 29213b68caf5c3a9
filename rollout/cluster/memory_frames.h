// Frames by which memory goes to another node: a descriptor cannot cross TCP, so its bytes do, in
// pieces with checksums. They travel between the messages of message_codec and begin with a byte
// that MessagePack never uses, so that pieces need no decoding.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

namespace rollpack::rollout {

// To the rank that holds a node's memory. In order; the first (offset 0) begins a new one.
struct MemoryPiece {
  uint64_t memory = 0;  // its number, never used twice
  uint64_t total_bytes = 0;
  uint64_t offset = 0;
  std::span<const uint8_t> bytes;  // at most kMaxPieceBytes
  uint32_t crc = 0;                // of the bytes; whoever keeps them checks it
};
// To any rank of the node: the descriptor of the next command is this memory, which rank `holder`
// of the node gives away.
struct MemoryUse {
  uint64_t memory = 0;
  int32_t holder = 0;
};
// To the holder: nobody needs it any more.
struct MemoryEnd {
  uint64_t memory = 0;
};
// From the holder: so much has come; an error where it cannot take the rest.
struct MemoryState {
  uint64_t memory = 0;
  uint64_t num_bytes = 0;
  std::string error;
};
// To a holder: send it on to a rank of another node, which listens there.
struct MemoryForward {
  uint64_t memory = 0;
  int32_t rank = 0;
  int port = 0;
  std::string address;
};
using MemoryFrame = std::variant<MemoryPiece, MemoryUse, MemoryEnd, MemoryState, MemoryForward>;

// Small enough that a message never waits long behind one, large enough that one costs little.
inline constexpr size_t kMaxPieceBytes = size_t{1} << 20;

bool is_memory_frame(std::span<const uint8_t> body);
std::vector<uint8_t> encode(const MemoryFrame& frame);
// A piece's bytes lie in `body`. Errors: data_loss where a length is wrong.
MemoryFrame decode_memory_frame(std::span<const uint8_t> body);

}  // namespace rollpack::rollout
