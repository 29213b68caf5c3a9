// Connected sockets, files of every kind and the count of open descriptors, for tests of the wire.
#pragma once

#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "tests/error_text.h"
#include "trainer_bridge/wire/frame.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::bridge {

struct SocketPair {
  OwnedFd left, right;
};

inline SocketPair make_socket_pair() {
  int fds[2] = {-1, -1};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0) std::abort();
  return {OwnedFd(fds[0]), OwnedFd(fds[1])};
}

inline OwnedFd make_memfd(const std::string& bytes) {
  OwnedFd fd(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (::pwrite(fd.get(), bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    std::abort();
  }
  return fd;
}

inline std::string read_all(int fd, size_t bytes) {
  std::string text(bytes, '\0');
  const ssize_t got = ::pread(fd, text.data(), bytes, 0);
  text.resize(got < 0 ? 0 : static_cast<size_t>(got));
  return text;
}

inline size_t num_open_fds() {
  using Directory = std::filesystem::directory_iterator;
  return static_cast<size_t>(std::distance(Directory("/proc/self/fd"), Directory()));
}

inline Deadline in_ms(int64_t ms) {
  return std::chrono::steady_clock::now() + std::chrono::milliseconds(ms);
}

inline std::vector<uint8_t> bytes_of(const std::string& text) {
  return {text.begin(), text.end()};
}

// The length and the bytes behind it, as they go over the socket.
inline std::vector<uint8_t> framed(const std::vector<uint8_t>& body) {
  std::vector<uint8_t> frame(4 + body.size());
  for (size_t i = 0; i < 4; ++i) frame[i] = static_cast<uint8_t>(body.size() >> (8 * i));
  std::copy(body.begin(), body.end(), frame.begin() + 4);
  return frame;
}

using rollpack::testing::error_of;

}  // namespace rollpack::bridge
