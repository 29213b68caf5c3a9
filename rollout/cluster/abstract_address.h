// Addresses of Unix sockets with abstract names: they are no files, so nothing is left of them.
#pragma once

#include <sys/socket.h>
#include <sys/un.h>

#include <cstddef>
#include <cstring>
#include <string>

namespace rollpack::rollout {

class AbstractAddress {
 public:
  // `name`: at most 107 bytes.
  explicit AbstractAddress(const std::string& name) {
    // The first byte stays 0: no file.
    std::memcpy(address_.sun_path + 1, name.data(), name.size());
    size_ = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  }

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&address_); }
  socklen_t size() const { return size_; }

 private:
  sockaddr_un address_{.sun_family = AF_UNIX, .sun_path = {}};
  socklen_t size_ = 0;
};

}  // namespace rollpack::rollout
