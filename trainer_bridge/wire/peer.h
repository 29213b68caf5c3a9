// Who is at the other end of a connection, as the kernel knows it, and whether it still lives.
#pragma once

#include <sys/types.h>

#include <optional>

#include "kernels/base/error.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::bridge {

struct Peer {
  uid_t uid = 0;
  pid_t pid = 0;  // 0 across pid namespaces
  // Readable once the process is gone; none where the kernel cannot say. End of file on the socket
  // alone is no death notice: a forked child may hold the socket open for as long as it lives.
  OwnedFd pidfd;
};

// Asks the kernel who connected (SO_PEERCRED, SO_PEERPIDFD, else pidfd_open).
// Errors: internal where the socket has no credentials.
Peer peer_of(int socket);

// Whether the process of a pidfd has ended.
bool has_ended(int pidfd);

// failed_precondition naming both uids where the peer is another user's, otherwise nothing.
std::optional<ErrorInfo> other_user(const Peer& peer);

}  // namespace rollpack::bridge
