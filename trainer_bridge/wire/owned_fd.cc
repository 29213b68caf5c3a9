#include "trainer_bridge/wire/owned_fd.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "kernels/base/error.h"

namespace rollpack::bridge {

void OwnedFd::reset(int fd) {
  // Linux closes the descriptor even where close() says EINTR: never try twice.
  if (fd_ >= 0) ::close(fd_);
  fd_ = fd;
}

OwnedFd OwnedFd::duplicate(int fd) {
  const int copy = ::fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (copy < 0) {
    throw Error({.code = ErrorCode::kResourceExhausted,
                 .field = "file descriptor",
                 .value = std::to_string(fd),
                 .message = fmt::format("cannot be duplicated ({}); raise ulimit -n",
                                        std::strerror(errno))});
  }
  return OwnedFd(copy);
}

}  // namespace rollpack::bridge
