// A descriptor of the tests, closed at the end of its scope.
#pragma once

#include <unistd.h>

namespace rollpack::bridge::testing {

class PeerFile {
 public:
  explicit PeerFile(int fd) : fd_(fd) {}
  ~PeerFile() {
    if (fd_ >= 0) ::close(fd_);
  }
  PeerFile(const PeerFile&) = delete;
  PeerFile& operator=(const PeerFile&) = delete;
  int fd() const { return fd_; }

 private:
  int fd_;
};

}  // namespace rollpack::bridge::testing
