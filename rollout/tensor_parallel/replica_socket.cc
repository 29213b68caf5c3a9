#include "rollout/tensor_parallel/replica_socket.h"

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <optional>
#include <thread>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "kernels/base/error.h"
#include "kernels/communicator/shared_memory_communicator.h"
#include "trainer_bridge/shared_memory/segment.h"
#include "trainer_bridge/wire/frame.h"
#include "trainer_bridge/wire/peer.h"

namespace rollpack::rollout {
namespace {

using bridge::OwnedFd;

// A rank that connects says at once which it is.
constexpr std::chrono::seconds kHelloLimit{5};
constexpr std::chrono::milliseconds kRetryInterval{10};

struct AbstractAddress {
  sockaddr_un address{.sun_family = AF_UNIX, .sun_path = {}};
  socklen_t size = 0;

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&address); }
};

AbstractAddress address_of(const ReplicaName& name) {
  AbstractAddress named;
  // The first byte stays 0: no file.
  const std::string text =
      fmt::format("rollpack-{}-replica-{}", name.job.substr(0, 64), name.replica);
  std::memcpy(named.address.sun_path + 1, text.data(), text.size());
  named.size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  return named;
}

[[noreturn]] void fail_call(const char* call) {
  throw Error({.code = ErrorCode::kUnavailable,
               .field = "replica socket",
               .message = fmt::format("{}: {}", call, std::strerror(errno))});
}

int64_t memory_bytes(int32_t size) {
  return kernels::SharedMemoryCommunicator::region_bytes(size);
}

}  // namespace

std::vector<OwnedFd> accept_followers(const ReplicaName& name, int32_t size,
                                      bridge::Deadline deadline) {
  const AbstractAddress address = address_of(name);
  const OwnedFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!listener) fail_call("socket");
  if (::bind(listener.get(), address.get(), address.size) != 0) fail_call("bind");
  if (::listen(listener.get(), SOMAXCONN) != 0) fail_call("listen");
  std::vector<OwnedFd> followers(static_cast<size_t>(size));
  for (int32_t num_missing = size - 1; num_missing > 0;) {
    pollfd waiting{.fd = listener.get(), .events = POLLIN, .revents = 0};
    if (::poll(&waiting, 1, bridge::milliseconds_until(deadline)) == 0) {
      std::vector<int32_t> missing;
      for (int32_t r = 1; r < size; ++r) {
        if (!followers[static_cast<size_t>(r)]) missing.push_back(r);
      }
      throw Error({.code = ErrorCode::kDeadlineExceeded,
                   .field = fmt::format("replica {}", name.replica),
                   .value = fmt::format("rank {} of its {} ranks did not connect",
                                        fmt::join(missing, ", "), size)});
    }
    OwnedFd peer(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!peer || bridge::other_user(bridge::peer_of(peer.get()))) continue;
    try {
      const std::optional<bridge::Frame> hello = bridge::receive_frame(
          peer.get(), std::min(deadline, std::chrono::steady_clock::now() + kHelloLimit));
      if (!hello || hello->body.size() != sizeof(int32_t)) continue;
      int32_t rank = 0;
      std::memcpy(&rank, hello->body.data(), sizeof rank);
      if (rank < 1 || rank >= size || followers[static_cast<size_t>(rank)]) continue;
      followers[static_cast<size_t>(rank)] = std::move(peer);
      --num_missing;
    } catch (const Error&) {
      // It has gone again, or is none of ours.
    }
  }
  return followers;
}

OwnedFd connect_to_leader(const ReplicaName& name, kernels::ReplicaRank at,
                          bridge::Deadline deadline) {
  const AbstractAddress address = address_of(name);
  for (;;) {
    OwnedFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!socket) fail_call("socket");
    if (::connect(socket.get(), address.get(), address.size) == 0) {
      if (const auto other = bridge::other_user(bridge::peer_of(socket.get()))) throw Error(*other);
      std::vector<uint8_t> hello(sizeof(int32_t));
      std::memcpy(hello.data(), &at.rank, hello.size());
      bridge::send_frame(socket.get(), std::move(hello), {}, deadline);
      return socket;
    }
    // The leader may not listen yet.
    if (errno != ECONNREFUSED && errno != EAGAIN && errno != EINTR) fail_call("connect");
    if (std::chrono::steady_clock::now() >= deadline) {
      throw Error({.code = ErrorCode::kDeadlineExceeded,
                   .field = fmt::format("replica {}", name.replica),
                   .value = fmt::format("rank {} of {} cannot reach the leader", at.rank, at.size),
                   .message = "ranks of one replica run on one host, in one network namespace"});
    }
    std::this_thread::sleep_for(kRetryInterval);
  }
}

ReplicaMemory make_replica_memory(int32_t size) {
  const int64_t bytes = memory_bytes(size);
  bridge::WritableMemfd memory = bridge::WritableMemfd::create("rollpack-replica", bytes);
  // Taken now: later the first touch of a page that cannot be had would end the process.
  const int result = ::posix_fallocate(memory.fd(), 0, bytes);
  if (result != 0) {
    throw Error({.code = ErrorCode::kResourceExhausted,
                 .field = "memory between the ranks of a replica",
                 .value = fmt::format("{} bytes", bytes),
                 .message = std::strerror(result)});
  }
  ReplicaMemory made{.fd = OwnedFd::duplicate(memory.fd()), .bytes = nullptr};
  made.bytes = map_replica_memory(made.fd.get(), size);
  return made;
}

std::shared_ptr<std::byte> map_replica_memory(int fd, int32_t size) {
  const auto bytes = static_cast<size_t>(memory_bytes(size));
  struct stat status {};
  if (::fstat(fd, &status) != 0 || static_cast<size_t>(status.st_size) != bytes) {
    throw Error({.code = ErrorCode::kDataLoss,
                 .field = "memory between the ranks of a replica",
                 .value = fmt::format("{} bytes", status.st_size),
                 .allowed = fmt::format("{} bytes", bytes)});
  }
  void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    throw Error({.code = ErrorCode::kResourceExhausted,
                 .field = "memory between the ranks of a replica",
                 .value = fmt::format("{} bytes", bytes),
                 .message = fmt::format("mmap: {}", std::strerror(errno))});
  }
  return {static_cast<std::byte*>(data), [bytes](std::byte* at) { ::munmap(at, bytes); }};
}

}  // namespace rollpack::rollout
