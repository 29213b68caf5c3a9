// The socket's place in the file system: a 0700 directory, a lock that says whose it is, and the
// socket itself, 0600. The lock is held by the kernel, so a server that was killed leaves nothing
// behind that the next one could mistake for a live one.
#pragma once

#include <string>

#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::bridge {

inline constexpr size_t kMaxSocketPathBytes = 107;  // sockaddr_un without its terminating zero

class ListenSocket {
 public:
  // Creates the directory where there is none and takes the lock `path`.lock.
  // Errors, field bridge.socket: invalid_argument for an empty or too long path or one that is
  // something else; failed_precondition when a live server has the lock.
  explicit ListenSocket(std::string path);
  // Removes the socket and the lock.
  ~ListenSocket();
  ListenSocket(const ListenSocket&) = delete;
  ListenSocket& operator=(const ListenSocket&) = delete;

  // Replaces a stale socket and listens; connections may come from here on.
  void listen();
  // Non-blocking, close-on-exec.
  int fd() const { return socket_.get(); }
  const std::string& path() const { return path_; }

 private:
  void create_directory() const;
  void take_lock();
  [[noreturn]] void fail_system(const char* call) const;

  const std::string path_;
  OwnedFd lock_;
  OwnedFd socket_;
};

}  // namespace rollpack::bridge
