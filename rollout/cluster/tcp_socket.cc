#include "rollout/cluster/tcp_socket.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "kernels/base/error.h"
#include "trainer_bridge/wire/deadline.h"

namespace rollpack::rollout {
namespace {

using bridge::OwnedFd;
using Clock = std::chrono::steady_clock;

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t size = 0;

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
  void set_port(int port) {
    const auto wire = htons(static_cast<uint16_t>(port));
    if (storage.ss_family == AF_INET) {
      reinterpret_cast<sockaddr_in*>(&storage)->sin_port = wire;
    } else {
      reinterpret_cast<sockaddr_in6*>(&storage)->sin6_port = wire;
    }
  }
  int port() const {
    return ntohs(storage.ss_family == AF_INET
                     ? reinterpret_cast<const sockaddr_in*>(&storage)->sin_port
                     : reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_port);
  }
};

std::optional<SocketAddress> parse_address(const std::string& text) {
  SocketAddress address;
  auto* v4 = reinterpret_cast<sockaddr_in*>(&address.storage);
  auto* v6 = reinterpret_cast<sockaddr_in6*>(&address.storage);
  if (::inet_pton(AF_INET, text.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    address.size = sizeof *v4;
    return address;
  }
  if (::inet_pton(AF_INET6, text.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    address.size = sizeof *v6;
    return address;
  }
  return std::nullopt;
}

SocketAddress any_address(int family) {
  SocketAddress address;
  address.storage.ss_family = static_cast<sa_family_t>(family);
  address.size = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
  return address;  // zeros are INADDR_ANY and in6addr_any
}

struct HostAddress {
  std::string interface, text;
  bool is_loopback = false;
};

// Of the interfaces that are up, IPv4 first; link-local ones need an interface to be reached by,
// which another host names differently.
std::vector<HostAddress> host_addresses() {
  ifaddrs* raw = nullptr;
  if (::getifaddrs(&raw) != 0) return {};
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> list(raw, &::freeifaddrs);
  std::vector<HostAddress> v4, v6;
  for (const ifaddrs* each = raw; each != nullptr; each = each->ifa_next) {
    if (each->ifa_addr == nullptr || (each->ifa_flags & IFF_UP) == 0) continue;
    char text[INET6_ADDRSTRLEN] = {};
    const bool is_loopback = (each->ifa_flags & IFF_LOOPBACK) != 0;
    if (each->ifa_addr->sa_family == AF_INET) {
      const auto* address = reinterpret_cast<const sockaddr_in*>(each->ifa_addr);
      ::inet_ntop(AF_INET, &address->sin_addr, text, sizeof text);
      v4.push_back({each->ifa_name, text, is_loopback});
    } else if (each->ifa_addr->sa_family == AF_INET6) {
      const auto* address = reinterpret_cast<const sockaddr_in6*>(each->ifa_addr);
      if (IN6_IS_ADDR_LINKLOCAL(&address->sin6_addr)) continue;
      ::inet_ntop(AF_INET6, &address->sin6_addr, text, sizeof text);
      v6.push_back({each->ifa_name, text, is_loopback});
    }
  }
  v4.insert(v4.end(), v6.begin(), v6.end());
  return v4;
}

[[noreturn]] void fail_interface(const std::string& value, const std::string& message) {
  std::vector<std::string> known;
  for (const HostAddress& each : host_addresses()) {
    known.push_back(fmt::format("{} ({})", each.interface, each.text));
  }
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = "cluster.interface",
               .value = value,
               .allowed = fmt::format("an interface or address of rank 0's host: {}",
                                      fmt::join(known, ", ")),
               .message = message});
}

// Where others reach this host, by what the configuration says.
std::vector<std::string> reachable_addresses(const std::string& interface) {
  std::vector<std::string> found;
  for (const HostAddress& each : host_addresses()) {
    const bool is_wanted = interface.empty()
                               ? !each.is_loopback
                               : interface == each.interface || interface == each.text;
    if (is_wanted) found.push_back(each.text);
  }
  if (!found.empty()) return found;
  fail_interface(interface, interface.empty() ? "ranks of other hosts cannot reach this one"
                                              : "there is none of that name, or it is down");
}

OwnedFd try_listen(SocketAddress address, int port, int& error) {
  OwnedFd socket(
      ::socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  error = errno;
  if (!socket) return {};
  const int on = 1, off = 0;
  ::setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (address.storage.ss_family == AF_INET6) {
    ::setsockopt(socket.get(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
  }
  address.set_port(port);
  if (::bind(socket.get(), address.get(), address.size) == 0 &&
      ::listen(socket.get(), SOMAXCONN) == 0) {
    return socket;
  }
  error = errno;
  return {};
}

int port_of(int socket) {
  SocketAddress address;
  address.size = sizeof address.storage;
  ::getsockname(socket, reinterpret_cast<sockaddr*>(&address.storage), &address.size);
  return address.port();
}

std::string text_of(const SocketAddress& address) {
  char text[INET6_ADDRSTRLEN] = {};
  if (address.storage.ss_family == AF_INET) {
    const auto* v4 = reinterpret_cast<const sockaddr_in*>(&address.storage);
    ::inet_ntop(AF_INET, &v4->sin_addr, text, sizeof text);
  } else {
    const auto* v6 = reinterpret_cast<const sockaddr_in6*>(&address.storage);
    ::inet_ntop(AF_INET6, &v6->sin6_addr, text, sizeof text);
  }
  return text;
}

[[noreturn]] void fail_connect(ErrorCode code, const std::string& address, int port,
                               const std::string& reason) {
  throw Error({.code = code,
               .field = "rank 0",
               .value = fmt::format("{} port {}", address, port),
               .message = reason});
}

void set_option(int socket, int level, int name, int value) {
  ::setsockopt(socket, level, name, &value, sizeof value);  // best effort: all are Linux 2.6.37's
}

}  // namespace

TcpListener listen_tcp(const TcpListenOptions& options) {
  TcpListener listener;
  listener.endpoint.addresses = reachable_addresses(options.interface);
  // One address where one was named, else all that the host has or will get.
  std::vector<SocketAddress> candidates = {any_address(AF_INET6), any_address(AF_INET)};
  if (!options.interface.empty()) {
    listener.endpoint.addresses.resize(1);
    candidates = {*parse_address(listener.endpoint.addresses[0])};
  }
  const int last =
      options.port == 0 ? 0 : std::min(65535, options.port + std::max(1, options.num_ports) - 1);
  int error = 0;
  for (int port = options.port; port <= last; ++port) {
    for (const SocketAddress& address : candidates) {
      listener.socket = try_listen(address, port, error);
      if (!listener.socket) continue;
      listener.endpoint.port = port_of(listener.socket.get());
      return listener;
    }
  }
  throw Error({.code = ErrorCode::kUnavailable,
               .field = "cluster.port",
               .value = options.port == 0 ? "0" : fmt::format("{} to {}", options.port, last),
               .allowed = "a range with a free TCP port on rank 0's host; 0 for any",
               .message = fmt::format("the last one: {}", std::strerror(error))});
}

OwnedFd begin_connect_tcp(const std::string& address, int port) {
  std::optional<SocketAddress> target = parse_address(address);
  if (!target) fail_connect(ErrorCode::kInvalidArgument, address, port, "no numeric address");
  target->set_port(port);
  OwnedFd socket(
      ::socket(target->storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) fail_connect(ErrorCode::kUnavailable, address, port, std::strerror(errno));
  if (::connect(socket.get(), target->get(), target->size) != 0 && errno != EINPROGRESS) {
    fail_connect(ErrorCode::kUnavailable, address, port, std::strerror(errno));
  }
  return socket;
}

OwnedFd connect_tcp(const std::string& address, int port, Clock::time_point deadline) {
  OwnedFd socket = begin_connect_tcp(address, port);
  for (;;) {
    pollfd waiting{.fd = socket.get(), .events = POLLOUT};
    const int timeout_ms = bridge::milliseconds_until(deadline);
    const int ready = ::poll(&waiting, 1, timeout_ms);
    if (ready > 0) break;
    if (timeout_ms == 0) {
      fail_connect(ErrorCode::kDeadlineExceeded, address, port, "no answer in time");
    }
  }
  int error = 0;
  socklen_t size = sizeof error;
  ::getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &size);
  if (error != 0) fail_connect(ErrorCode::kUnavailable, address, port, std::strerror(error));
  return socket;
}

std::string own_address(int socket) {
  SocketAddress address;
  address.size = sizeof address.storage;
  ::getsockname(socket, reinterpret_cast<sockaddr*>(&address.storage), &address.size);
  return text_of(address);
}

void watch_tcp(int socket, std::chrono::milliseconds limit) {
  const int limit_ms = static_cast<int>(std::clamp<int64_t>(limit.count(), 1000, 1 << 30));
  // Probes begin after a third of the limit; the kernel counts them in whole seconds.
  const int third_s = std::clamp(limit_ms / 3000, 1, 32767);
  set_option(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  set_option(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(socket, IPPROTO_TCP, TCP_KEEPIDLE, third_s);
  set_option(socket, IPPROTO_TCP, TCP_KEEPINTVL, third_s);
  set_option(socket, IPPROTO_TCP, TCP_KEEPCNT, 3);
  set_option(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, limit_ms);
}

void reset_on_close(int socket) {
  const linger now{.l_onoff = 1, .l_linger = 0};
  ::setsockopt(socket, SOL_SOCKET, SO_LINGER, &now, sizeof now);
}

}  // namespace rollpack::rollout
