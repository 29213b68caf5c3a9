// Frames over an asynchronous stream socket, Unix or TCP (which carries no descriptors). Boost.Asio
// cannot carry descriptors, so it only waits for readiness and the calls of fd_passing.h do the
// rest. Knows nothing of what frames mean: the server's clients and the links between ranks are
// both made of it.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/base/error.h"
#include "trainer_bridge/wire/asio.h"
#include "trainer_bridge/wire/frame.h"

namespace rollpack::bridge {

struct FrameSocketOptions {
  size_t max_queued_bytes = size_t{64} << 20;       // a peer that reads too slowly is dropped
  std::chrono::milliseconds frame_deadline{5000};   // first byte to last; 0: no limit
  std::chrono::milliseconds finish_deadline{1000};  // for what finish() still has to write
};

// Lives on the one thread that runs its io_context; all calls and callbacks happen there.
class FrameSocket : public std::enable_shared_from_this<FrameSocket> {
 public:
  using OnFrame = std::function<void(Frame)>;
  // Called once, when no frame will follow. std::nullopt: the peer closed between frames.
  // Otherwise what broke; send() still works, so that the peer can be told before finish().
  using OnEnd = std::function<void(std::optional<ErrorInfo>)>;

  FrameSocket(asio::io_context& io, OwnedFd socket, FrameSocketOptions options);

  void start(OnFrame on_frame, OnEnd on_end);
  // Queues one frame. Beyond max_queued_bytes the peer has lost its connection: everything queued
  // is dropped and `on_end` is told. Does nothing once closed.
  // Errors: those of FrameWriter.
  void send(std::vector<uint8_t> body, std::vector<OwnedFd> fds = {});
  // Takes what the peer has sent so far, as far as it is there now.
  void drain();
  // Reads no more, writes what is queued, then closes; `on_end` is not called.
  void finish();
  // Closes at once; `on_end` is not called.
  void close();
  bool is_open() const { return descriptor_.is_open(); }
  int native_handle() { return descriptor_.native_handle(); }
  size_t queued_bytes() const { return queued_bytes_; }

 private:
  void wait_readable();
  // Reads at most `max_frames`; false once the socket is at its end.
  bool read_frames(int max_frames);
  void watch_frame();
  void write_queued();
  void end(std::optional<ErrorInfo> error);

  asio::posix::stream_descriptor descriptor_;
  asio::steady_timer frame_timer_;
  asio::steady_timer finish_timer_;
  const FrameSocketOptions options_;
  OnFrame on_frame_;
  OnEnd on_end_;
  FrameReader reader_;
  std::deque<FrameWriter> queue_;
  size_t queued_bytes_ = 0;
  bool is_reading_ = false;
  bool is_finishing_ = false;
  bool is_waiting_to_write_ = false;
  bool is_watching_frame_ = false;
};

}  // namespace rollpack::bridge
