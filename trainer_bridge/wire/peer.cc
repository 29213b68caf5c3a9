#include "trainer_bridge/wire/peer.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <string>

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77  // Linux 6.5; newer than this C library's headers
#endif

namespace rollpack::bridge {

bool has_ended(int pidfd) {
  pollfd entry = {pidfd, POLLIN, 0};
  return ::poll(&entry, 1, 0) > 0;
}

Peer peer_of(int socket) {
  ucred credentials = {};
  socklen_t size = sizeof credentials;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) {
    fail_invariant("a connected Unix socket has no SO_PEERCRED");
  }
  Peer peer{.uid = credentials.uid, .pid = credentials.pid};
  int pidfd = -1;
  size = sizeof pidfd;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &size) == 0) {
    peer.pidfd.reset(pidfd);
  } else if (peer.pid > 0) {
    peer.pidfd.reset(static_cast<int>(::syscall(SYS_pidfd_open, peer.pid, 0)));
  }
  return peer;
}

std::optional<ErrorInfo> other_user(const Peer& peer) {
  if (peer.uid == ::geteuid()) return std::nullopt;
  return ErrorInfo{.code = ErrorCode::kFailedPrecondition,
                   .field = "peer uid",
                   .value = std::to_string(peer.uid),
                   .origin = fmt::format("process {}", peer.pid),
                   .allowed = fmt::format("{}, the user this server runs as", ::geteuid())};
}

}  // namespace rollpack::bridge
