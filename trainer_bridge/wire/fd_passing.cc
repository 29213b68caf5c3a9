#include "trainer_bridge/wire/fd_passing.h"

#include <fmt/format.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "kernels/base/error.h"

namespace rollpack::bridge {
namespace {

constexpr size_t kControlBytes = CMSG_SPACE(sizeof(int) * kMaxFdsPerFrame);

bool peer_is_gone(int error) {
  return error == EPIPE || error == ECONNRESET || error == ENOTCONN || error == ESHUTDOWN;
}

[[noreturn]] void throw_system(const char* call, int error) {
  const bool scarce = error == ETOOMANYREFS || error == ENOBUFS || error == ENOMEM;
  throw Error({.code = scarce ? ErrorCode::kResourceExhausted : ErrorCode::kInternal,
               .field = call,
               .value = std::strerror(error),
               .message = error == ETOOMANYREFS
                              ? "too many file descriptors are in flight: the peer does not read"
                              : "the socket cannot be used"});
}

// Takes over every descriptor of the message, whatever the flags say, so that none leaks.
void take_fds(msghdr& message, std::vector<OwnedFd>& fds) {
  for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr;
       part = CMSG_NXTHDR(&message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(int));
      fds.emplace_back(fd);
    }
  }
}

}  // namespace

IoResult send_some(int socket, std::span<const uint8_t> bytes, std::span<const int> fds) {
  if (fds.size() > static_cast<size_t>(kMaxFdsPerFrame)) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "num_fds",
                 .value = std::to_string(fds.size()),
                 .allowed = fmt::format("at most {} file descriptors a frame", kMaxFdsPerFrame)});
  }
  iovec vector = {const_cast<uint8_t*>(bytes.data()), bytes.size()};
  alignas(cmsghdr) uint8_t control[kControlBytes];
  msghdr message = {};
  message.msg_iov = &vector;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    std::memset(control, 0, sizeof control);
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* part = CMSG_FIRSTHDR(&message);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(part), fds.data(), fds.size_bytes());
  }
  for (;;) {
    const ssize_t sent = ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent >= 0) return {IoStatus::kDone, static_cast<size_t>(sent)};
    if (errno == EINTR) continue;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return {IoStatus::kWouldBlock, 0};
    if (peer_is_gone(errno)) return {IoStatus::kEnd, 0};
    throw_system("sendmsg", errno);
  }
}

IoResult receive_some(int socket, std::span<uint8_t> bytes, std::vector<OwnedFd>& fds) {
  iovec vector = {bytes.data(), bytes.size()};
  alignas(cmsghdr) uint8_t control[kControlBytes];
  for (;;) {
    msghdr message = {};
    message.msg_iov = &vector;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t got = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (got < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return {IoStatus::kWouldBlock, 0};
      if (peer_is_gone(errno)) return {IoStatus::kEnd, 0};
      throw_system("recvmsg", errno);
    }
    if (message.msg_flags & MSG_CTRUNC) {
      std::vector<OwnedFd> closed;
      take_fds(message, closed);
      throw Error(
          {.code = ErrorCode::kResourceExhausted,
           .field = "file descriptors",
           .value = fmt::format("{} of a message arrived, others were cut off", closed.size()),
           .message = "this process may open no more: raise ulimit -n"});
    }
    take_fds(message, fds);
    if (got == 0) return {IoStatus::kEnd, 0};
    return {IoStatus::kDone, static_cast<size_t>(got)};
  }
}

}  // namespace rollpack::bridge
