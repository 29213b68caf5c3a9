#include "rollout/cluster/memory_frames.h"

#include <array>
#include <cstring>

#include <fmt/format.h>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

constexpr uint8_t kMark = 0xC1;  // "never used" in MessagePack's table of formats

// What every frame begins with; fields that a kind does not need are 0.
struct Header {
  uint8_t mark = kMark;
  uint8_t kind = 0;  // index in MemoryFrame
  uint8_t reserved[2] = {};
  uint32_t crc = 0;
  uint64_t memory = 0;
  uint64_t total_bytes =
      0;  // of MemoryState: those that have come; of MemoryUse and MemoryForward: the rank
  uint64_t offset = 0;  // of MemoryForward: the port
};
static_assert(sizeof(Header) == 32);

[[noreturn]] void fail_frame(const std::string& value, const std::string& allowed) {
  throw Error(
      {.code = ErrorCode::kDataLoss, .field = "memory frame", .value = value, .allowed = allowed});
}

struct Encoder {
  Header header;
  std::span<const uint8_t> rest;

  void operator()(const MemoryPiece& m) {
    header.crc = m.crc;
    header.memory = m.memory;
    header.total_bytes = m.total_bytes;
    header.offset = m.offset;
    rest = m.bytes;
  }
  void operator()(const MemoryUse& m) {
    header.memory = m.memory;
    header.total_bytes = static_cast<uint64_t>(m.holder);
  }
  void operator()(const MemoryEnd& m) { header.memory = m.memory; }
  void operator()(const MemoryState& m) {
    header.memory = m.memory;
    header.total_bytes = m.num_bytes;
    rest = {reinterpret_cast<const uint8_t*>(m.error.data()), m.error.size()};
  }
  void operator()(const MemoryForward& m) {
    header.memory = m.memory;
    header.total_bytes = static_cast<uint64_t>(m.rank);
    header.offset = static_cast<uint64_t>(m.port);
    rest = {reinterpret_cast<const uint8_t*>(m.address.data()), m.address.size()};
  }
};

MemoryPiece decode_piece(const Header& header, std::span<const uint8_t> bytes) {
  const uint64_t left =
      header.offset <= header.total_bytes ? header.total_bytes - header.offset : 0;
  if (bytes.empty() || bytes.size() > kMaxPieceBytes || bytes.size() > left) {
    fail_frame(fmt::format("{} bytes at {} of {}", bytes.size(), header.offset, header.total_bytes),
               fmt::format("1 to {} bytes, within the memory", kMaxPieceBytes));
  }
  return {header.memory, header.total_bytes, header.offset, bytes, header.crc};
}

}  // namespace

bool is_memory_frame(std::span<const uint8_t> body) {
  return !body.empty() && body[0] == kMark;
}

std::vector<uint8_t> encode(const MemoryFrame& frame) {
  Encoder encoder;
  std::visit([&](const auto& known) { encoder(known); }, frame);
  encoder.header.kind = static_cast<uint8_t>(frame.index());
  std::vector<uint8_t> body(sizeof(Header) + encoder.rest.size());
  std::memcpy(body.data(), &encoder.header, sizeof(Header));
  if (!encoder.rest.empty()) {
    std::memcpy(body.data() + sizeof(Header), encoder.rest.data(), encoder.rest.size());
  }
  return body;
}

MemoryFrame decode_memory_frame(std::span<const uint8_t> body) {
  Header header;
  if (body.size() < sizeof header) fail_frame(fmt::format("{} bytes", body.size()), "32 or more");
  std::memcpy(&header, body.data(), sizeof header);
  const std::span<const uint8_t> rest = body.subspan(sizeof header);
  switch (header.kind) {
    case 0:
      return decode_piece(header, rest);
    case 1:
      return MemoryUse{header.memory, static_cast<int32_t>(header.total_bytes)};
    case 2:
      return MemoryEnd{header.memory};
    case 3:
      return MemoryState{header.memory, header.total_bytes, {rest.begin(), rest.end()}};
    case 4:
      return MemoryForward{header.memory,
                           static_cast<int32_t>(header.total_bytes),
                           static_cast<int>(header.offset),
                           {rest.begin(), rest.end()}};
    default:
      fail_frame(fmt::format("kind {}", header.kind), "0 to 4");
  }
}

}  // namespace rollpack::rollout
