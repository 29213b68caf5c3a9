// Frames: a u32 little-endian length, then that many bytes, 1 to 16 MiB. Reader and writer keep the
// state of one frame in transit, so that a frame may come and go a byte at a time, on blocking and
// on asynchronous sockets alike.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "trainer_bridge/wire/deadline.h"
#include "trainer_bridge/wire/fd_passing.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::bridge {

inline constexpr uint32_t kMaxFrameBytes = 16u << 20;
inline constexpr size_t kFrameHeaderBytes = 4;

struct Frame {
  std::vector<uint8_t> body;
  std::vector<OwnedFd> fds;  // what rode on the frame's first byte
};

// Never reads beyond its frame: the kernel ends a read where descriptors are attached, but joins
// the bytes before them, so only a read that starts with a frame's first byte says whose they are.
class FrameReader {
 public:
  // Reads what there is. kDone: take() has a whole frame. kEnd: closed between frames.
  // Errors: invalid_argument for a length out of range or descriptors inside a frame; data_loss for
  // a peer that closed inside a frame; resource_exhausted for lost descriptors.
  IoStatus read(int socket);
  Frame take();
  // Whether a frame has begun and is not whole.
  bool is_inside_frame() const { return header_bytes_ > 0; }

 private:
  bool parse_header();
  std::span<uint8_t> room();

  std::array<uint8_t, kFrameHeaderBytes> header_ = {};
  size_t header_bytes_ = 0;
  size_t length_ = 0;      // of the body, once the header is whole
  size_t body_bytes_ = 0;  // how many have come
  Frame frame_;
};

class FrameWriter {
 public:
  // Errors: invalid_argument for an empty or too long body or too many descriptors.
  FrameWriter(std::vector<uint8_t> body, std::vector<OwnedFd> fds);

  // Writes what goes out now. kDone: all of it. kEnd: the peer has closed.
  IoStatus write(int socket);
  size_t bytes() const { return bytes_.size(); }

 private:
  std::vector<uint8_t> bytes_;  // header and body: one system call for a small frame
  std::vector<OwnedFd> fds_;    // closed here once the first byte took them along
  size_t sent_ = 0;
};

// Sends one frame and waits until it is gone. `socket` may block or not.
// Errors: deadline_exceeded; unavailable when the peer has closed.
void send_frame(int socket, std::vector<uint8_t> body, std::vector<OwnedFd> fds, Deadline deadline);

// Waits for one frame; std::nullopt when the peer closed between frames.
// Errors: deadline_exceeded and those of FrameReader::read.
std::optional<Frame> receive_frame(int socket, Deadline deadline);

}  // namespace rollpack::bridge
