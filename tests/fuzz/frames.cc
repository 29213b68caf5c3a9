// Frames of the socket: the bytes come in pieces of a size that the first byte says. What was read
// as frames is what was sent.
#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>
#include <vector>

#include "tests/fuzz/fuzz_input.h"
#include "trainer_bridge/wire/frame.h"

namespace {

using namespace rollpack::bridge;
using namespace rollpack::fuzz;

constexpr size_t kMaxPieceBytes = 64;

struct Reading {
  FrameReader reader;
  std::vector<uint8_t> bytes;  // of whole frames, as they would be sent
  bool is_open = true;

  void read(int socket) {
    if (is_open && !reads_or_refuses([&] { read_frames(socket); })) is_open = false;
  }

  void read_frames(int socket) {
    for (;;) {
      const IoStatus status = reader.read(socket);
      if (status == IoStatus::kEnd) is_open = false;
      if (status != IoStatus::kDone) return;
      const Frame frame = reader.take();
      require(!frame.body.empty(), "a frame without a body");
      const auto length = static_cast<uint32_t>(frame.body.size());
      for (int i = 0; i < 4; ++i) bytes.push_back(length >> (8 * i) & 0xff);
      bytes.insert(bytes.end(), frame.body.begin(), frame.body.end());
    }
  }
};

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 1) return 0;
  const size_t piece_bytes = 1 + data[0] % kMaxPieceBytes;
  const auto sent = bytes_of(data, size).subspan(1);
  int pair[2];
  require(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0,
          "socketpair failed");
  const OwnedFd peer(pair[0]), own(pair[1]);
  Reading reading;
  for (size_t at = 0; at < sent.size() && reading.is_open; at += piece_bytes) {
    const auto piece = sent.subspan(at, std::min(piece_bytes, sent.size() - at));
    require(::write(peer.get(), piece.data(), piece.size()) == static_cast<ssize_t>(piece.size()),
            "the socket took only a part");
    reading.read(own.get());
  }
  ::shutdown(peer.get(), SHUT_WR);
  reading.read(own.get());
  require(!reading.is_open, "the peer's end was not seen");
  require(reading.bytes.size() <= sent.size() &&
              std::equal(reading.bytes.begin(), reading.bytes.end(), sent.begin()),
          "frames that were not sent");
  return 0;
}
