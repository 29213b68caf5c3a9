#include "trainer_bridge/wire/frame.h"

#include <fmt/format.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::bridge {
namespace {

// A claimed length is not believed until bytes come: the body grows by doubling from here.
constexpr size_t kFirstBodyBytes = 64u << 10;

void check_length(uint64_t length) {
  if (length >= 1 && length <= kMaxFrameBytes) return;
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = "frame length",
               .value = std::to_string(length),
               .allowed = fmt::format("1 to {} bytes", kMaxFrameBytes)});
}

// Waits until `socket` is ready for `events`, at least once even when the deadline has passed.
void wait_ready(int socket, short events, Deadline deadline, const char* what) {
  for (;;) {
    pollfd entry = {socket, events, 0};
    const int timeout_ms = milliseconds_until(deadline);
    const int ready = ::poll(&entry, 1, timeout_ms);
    if (ready > 0) return;
    if (ready < 0 && errno != EINTR) fail_invariant("poll on a frame socket failed");
    if (ready == 0 && timeout_ms == 0) {
      throw Error({.code = ErrorCode::kDeadlineExceeded,
                   .field = what,
                   .message = "the peer did not answer in time"});
    }
  }
}

}  // namespace

bool FrameReader::parse_header() {
  if (header_bytes_ < kFrameHeaderBytes) return false;
  length_ = static_cast<size_t>(header_[0]) | static_cast<size_t>(header_[1]) << 8 |
            static_cast<size_t>(header_[2]) << 16 | static_cast<size_t>(header_[3]) << 24;
  check_length(length_);
  return true;
}

std::span<uint8_t> FrameReader::room() {
  if (body_bytes_ == frame_.body.size()) {
    frame_.body.resize(std::min(length_, std::max(kFirstBodyBytes, 2 * body_bytes_)));
  }
  return std::span(frame_.body).subspan(body_bytes_);
}

IoStatus FrameReader::read(int socket) {
  for (;;) {
    const bool in_header = header_bytes_ < kFrameHeaderBytes;
    const bool at_start = header_bytes_ == 0;
    std::vector<OwnedFd> fds;
    const IoResult got =
        receive_some(socket, in_header ? std::span(header_).subspan(header_bytes_) : room(), fds);
    if (got.status == IoStatus::kEnd && is_inside_frame()) {
      throw Error({.code = ErrorCode::kDataLoss,
                   .field = "frame",
                   .value = fmt::format("{} of {} bytes", header_bytes_ + body_bytes_,
                                        in_header ? "4" : std::to_string(length_ + 4)),
                   .message = "the peer closed inside a frame"});
    }
    if (got.status != IoStatus::kDone) return got.status;
    if (!fds.empty() && !at_start) {
      throw Error({.code = ErrorCode::kInvalidArgument,
                   .field = "num_fds",
                   .value = std::to_string(fds.size()),
                   .allowed = "file descriptors on the first byte of a frame only"});
    }
    if (at_start) frame_.fds = std::move(fds);
    (in_header ? header_bytes_ : body_bytes_) += got.bytes;
    if (in_header && !parse_header()) continue;
    if (!in_header && body_bytes_ == length_) return IoStatus::kDone;
  }
}

Frame FrameReader::take() {
  header_bytes_ = length_ = body_bytes_ = 0;
  return std::exchange(frame_, Frame{});
}

FrameWriter::FrameWriter(std::vector<uint8_t> body, std::vector<OwnedFd> fds)
    : bytes_(std::move(body)), fds_(std::move(fds)) {
  check_length(bytes_.size());
  if (fds_.size() > static_cast<size_t>(kMaxFdsPerFrame)) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "num_fds",
                 .value = std::to_string(fds_.size()),
                 .allowed = fmt::format("at most {} file descriptors a frame", kMaxFdsPerFrame)});
  }
  const auto length = static_cast<uint32_t>(bytes_.size());
  bytes_.insert(bytes_.begin(), kFrameHeaderBytes, 0);
  for (size_t i = 0; i < kFrameHeaderBytes; ++i) {
    bytes_[i] = static_cast<uint8_t>(length >> (8 * i));
  }
}

IoStatus FrameWriter::write(int socket) {
  while (sent_ < bytes()) {
    std::vector<int> raw;
    for (const OwnedFd& fd : fds_) raw.push_back(fd.get());
    const IoResult put = send_some(socket, std::span(bytes_).subspan(sent_), raw);
    if (put.status != IoStatus::kDone) return put.status;
    if (put.bytes > 0) fds_.clear();
    sent_ += put.bytes;
  }
  return IoStatus::kDone;
}

void send_frame(int socket, std::vector<uint8_t> body, std::vector<OwnedFd> fds,
                Deadline deadline) {
  FrameWriter writer(std::move(body), std::move(fds));
  for (;;) {
    const IoStatus status = writer.write(socket);
    if (status == IoStatus::kDone) return;
    if (status == IoStatus::kEnd) {
      throw Error({.code = ErrorCode::kUnavailable,
                   .field = "peer",
                   .message = "closed the connection while a frame was sent"});
    }
    wait_ready(socket, POLLOUT, deadline, "send");
  }
}

std::optional<Frame> receive_frame(int socket, Deadline deadline) {
  FrameReader reader;
  for (;;) {
    const IoStatus status = reader.read(socket);
    if (status == IoStatus::kDone) return reader.take();
    if (status == IoStatus::kEnd) return std::nullopt;
    wait_ready(socket, POLLIN, deadline, "receive");
  }
}

}  // namespace rollpack::bridge
