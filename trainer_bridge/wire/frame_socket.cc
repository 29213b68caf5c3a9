#include "trainer_bridge/wire/frame_socket.h"

#include <fmt/format.h>

#include <chrono>
#include <utility>

namespace rollpack::bridge {
namespace {

// Frames of one peer before others get their turn.
constexpr int kFramesPerTurn = 16;
// Frames taken from a peer that has died: what its socket can hold is far less.
constexpr int kFramesPerDrain = 4096;

}  // namespace

FrameSocket::FrameSocket(asio::io_context& io, OwnedFd socket, FrameSocketOptions options)
    : descriptor_(io, socket.release()), frame_timer_(io), finish_timer_(io), options_(options) {
  descriptor_.native_non_blocking(true);
}

void FrameSocket::start(OnFrame on_frame, OnEnd on_end) {
  on_frame_ = std::move(on_frame);
  on_end_ = std::move(on_end);
  is_reading_ = true;
  wait_readable();
}

void FrameSocket::wait_readable() {
  descriptor_.async_wait(asio::posix::stream_descriptor::wait_read,
                         [self = shared_from_this()](SystemError error) {
                           if (error || !self->is_reading_) return;
                           if (self->read_frames(kFramesPerTurn)) self->wait_readable();
                         });
}

bool FrameSocket::read_frames(int max_frames) {
  for (int i = 0; i < max_frames && is_reading_; ++i) {
    IoStatus status = IoStatus::kEnd;
    try {
      status = reader_.read(descriptor_.native_handle());
    } catch (const Error& error) {
      end(error.info);
      return false;
    }
    if (status == IoStatus::kEnd) {
      end(std::nullopt);
      return false;
    }
    if (status == IoStatus::kWouldBlock) break;
    frame_timer_.cancel();
    is_watching_frame_ = false;
    on_frame_(reader_.take());
  }
  if (is_reading_) watch_frame();
  return is_reading_;
}

void FrameSocket::watch_frame() {
  const bool watches = options_.frame_deadline.count() > 0;
  if (!watches || !reader_.is_inside_frame() || is_watching_frame_) return;
  is_watching_frame_ = true;
  frame_timer_.expires_after(options_.frame_deadline);
  frame_timer_.async_wait([self = shared_from_this()](SystemError error) {
    if (error || !self->is_reading_ || !self->is_watching_frame_) return;
    // An expiry of the frame before may have been queued when this one began.
    if (std::chrono::steady_clock::now() < self->frame_timer_.expiry()) return;
    self->end(ErrorInfo{
        .code = ErrorCode::kDeadlineExceeded,
        .field = "frame",
        .value = fmt::format("unfinished after {} ms", self->options_.frame_deadline.count()),
        .message = "a frame must come in one go"});
  });
}

void FrameSocket::send(std::vector<uint8_t> body, std::vector<OwnedFd> fds) {
  if (!is_open()) return;
  FrameWriter writer(std::move(body), std::move(fds));
  if (queued_bytes_ > 0 && queued_bytes_ + writer.bytes() > options_.max_queued_bytes) {
    const size_t waiting = queued_bytes_;
    queue_.clear();
    queued_bytes_ = 0;
    auto self = shared_from_this();  // `on_end` may let go of this object
    end(ErrorInfo{.code = ErrorCode::kResourceExhausted,
                  .field = "queued replies",
                  .value = fmt::format("{} bytes", waiting + writer.bytes()),
                  .allowed = fmt::format("at most {} bytes", options_.max_queued_bytes),
                  .message = "the peer reads too slowly"});
    close();
    return;
  }
  queued_bytes_ += writer.bytes();
  queue_.push_back(std::move(writer));
  if (!is_waiting_to_write_) write_queued();
}

void FrameSocket::write_queued() {
  while (!queue_.empty()) {
    IoStatus status = IoStatus::kEnd;
    std::optional<ErrorInfo> failure;
    try {
      status = queue_.front().write(descriptor_.native_handle());
    } catch (const Error& error) {
      failure = error.info;
    }
    if (status == IoStatus::kDone) {
      queued_bytes_ -= queue_.front().bytes();
      queue_.pop_front();
      continue;
    }
    if (status == IoStatus::kEnd) {
      // The reading side reports a peer that closed; frames it sent before are still read.
      queue_.clear();
      queued_bytes_ = 0;
      if (failure) end(failure);
      break;
    }
    is_waiting_to_write_ = true;
    descriptor_.async_wait(asio::posix::stream_descriptor::wait_write,
                           [self = shared_from_this()](SystemError error) {
                             self->is_waiting_to_write_ = false;
                             if (!error && self->is_open()) self->write_queued();
                           });
    return;
  }
  if (is_finishing_) close();
}

void FrameSocket::drain() {
  const auto self = shared_from_this();  // a callback may let go of this object
  if (is_reading_) read_frames(kFramesPerDrain);
}

void FrameSocket::end(std::optional<ErrorInfo> error) {
  if (!std::exchange(is_reading_, false)) return;
  frame_timer_.cancel();
  if (on_end_) on_end_(std::move(error));
}

void FrameSocket::finish() {
  is_reading_ = false;
  frame_timer_.cancel();
  if (!is_open()) return;
  if (queue_.empty()) {
    close();
    return;
  }
  is_finishing_ = true;
  finish_timer_.expires_after(options_.finish_deadline);
  finish_timer_.async_wait([self = shared_from_this()](SystemError error) {
    if (!error) self->close();
  });
}

void FrameSocket::close() {
  is_reading_ = false;
  frame_timer_.cancel();
  finish_timer_.cancel();
  queue_.clear();
  queued_bytes_ = 0;
  SystemError ignored;
  descriptor_.close(ignored);
}

}  // namespace rollpack::bridge
