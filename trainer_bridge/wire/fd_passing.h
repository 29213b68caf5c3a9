// Bytes and file descriptors over a Unix stream socket, one system call at a time. Descriptors ride
// on the first byte of a call (SCM_RIGHTS); what a peer sends is closed on exec from the start.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::bridge {

// The kernel's SCM_MAX_FD: one message carries no more.
inline constexpr int kMaxFdsPerFrame = 253;

enum class IoStatus : uint8_t {
  kDone,        // some bytes moved
  kWouldBlock,  // none can move now
  kEnd,         // the peer has closed
};

struct IoResult {
  IoStatus status = IoStatus::kDone;
  size_t bytes = 0;
};

// Sends a prefix of `bytes`, with all of `fds` if any byte went out. Never raises SIGPIPE.
// Errors: invalid_argument for more than kMaxFdsPerFrame; resource_exhausted when too many
// descriptors are in flight; otherwise a peer that is gone is kEnd.
IoResult send_some(int socket, std::span<const uint8_t> bytes, std::span<const int> fds);

// Receives up to bytes.size() bytes and appends the descriptors that came with them to `fds`.
// Errors: resource_exhausted when descriptors were cut off (MSG_CTRUNC), those that did arrive
// being closed.
IoResult receive_some(int socket, std::span<uint8_t> bytes, std::vector<OwnedFd>& fds);

}  // namespace rollpack::bridge
