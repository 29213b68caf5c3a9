// A file descriptor with one owner, closed when the owner goes.
#pragma once

#include <utility>

namespace rollpack::bridge {

class OwnedFd {
 public:
  OwnedFd() = default;
  explicit OwnedFd(int fd) : fd_(fd) {}
  ~OwnedFd() { reset(); }

  OwnedFd(OwnedFd&& other) noexcept : fd_(other.release()) {}
  OwnedFd& operator=(OwnedFd&& other) noexcept {
    if (this != &other) reset(other.release());
    return *this;
  }
  OwnedFd(const OwnedFd&) = delete;
  OwnedFd& operator=(const OwnedFd&) = delete;

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }
  void reset(int fd = -1);

  // A second descriptor of the same open file, closed on exec.
  // Errors: resource_exhausted when the process may open no more.
  static OwnedFd duplicate(int fd);

 private:
  int fd_ = -1;
};

}  // namespace rollpack::bridge
