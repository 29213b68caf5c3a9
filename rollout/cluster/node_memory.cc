#include "rollout/cluster/node_memory.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "kernels/base/error.h"
#include "rollout/cluster/abstract_address.h"
#include "trainer_bridge/wire/frame.h"
#include "trainer_bridge/wire/peer.h"

namespace rollpack::rollout {
namespace {

using bridge::OwnedFd;
using Clock = std::chrono::steady_clock;

// The holder answers from a thread that never computes.
constexpr std::chrono::seconds kFetchLimit{10};
// One request at a time: who connects and says nothing must not keep the others long.
constexpr std::chrono::seconds kRequestLimit{1};

AbstractAddress address_of(const std::string& job, int rank) {
  return AbstractAddress(fmt::format("rollpack-{}-{}", job.substr(0, 64), rank));
}

[[noreturn]] void fail_call(const char* call) {
  throw Error({.code = ErrorCode::kUnavailable,
               .field = "node socket",
               .message = fmt::format("{}: {}", call, std::strerror(errno))});
}

[[noreturn]] void fail_find(const MemoryUse& use, const std::string& reason) {
  throw Error({.code = ErrorCode::kUnavailable,
               .field = fmt::format("memory {} of rank {}", use.memory, use.holder),
               .value = "not there",
               .message = reason});
}

}  // namespace

NodeMemory::NodeMemory(std::string job, int rank) : job_(std::move(job)), rank_(rank) {
  const AbstractAddress address = address_of(job_, rank_);
  listener_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!listener_) fail_call("socket");
  if (::bind(listener_.get(), address.get(), address.size()) != 0) fail_call("bind");
  if (::listen(listener_.get(), SOMAXCONN) != 0) fail_call("listen");
  end_.reset(::eventfd(0, EFD_CLOEXEC));
  if (!end_) fail_call("eventfd");
  thread_ = std::thread([this] { serve(); });
}

NodeMemory::~NodeMemory() {
  const uint64_t one = 1;
  static_cast<void>(::write(end_.get(), &one, sizeof one));
  thread_.join();
}

OwnedFd NodeMemory::find(const MemoryUse& use) const {
  if (use.holder != rank_) return fetch(use);
  std::optional<OwnedFd> copy = received_.copy_of(use.memory);
  if (!copy) fail_find(use, "it has been dropped");
  return std::move(*copy);
}

OwnedFd NodeMemory::fetch(const MemoryUse& use) const {
  const auto deadline = Clock::now() + kFetchLimit;
  const AbstractAddress address = address_of(job_, use.holder);
  const OwnedFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket) fail_call("socket");
  if (::connect(socket.get(), address.get(), address.size()) != 0) {
    fail_find(use, std::strerror(errno));
  }
  if (bridge::other_user(bridge::peer_of(socket.get())))
    fail_find(use, "another user has its name");
  bridge::send_frame(socket.get(), encode(use), {}, deadline);
  std::optional<bridge::Frame> answer = bridge::receive_frame(socket.get(), deadline);
  if (!answer || answer->fds.size() != 1) fail_find(use, "it has been dropped");
  return std::move(answer->fds[0]);
}

void NodeMemory::serve() {
  for (;;) {
    pollfd waiting[2] = {{.fd = listener_.get(), .events = POLLIN},
                         {.fd = end_.get(), .events = POLLIN}};
    if (::poll(waiting, 2, -1) < 0) continue;
    if (waiting[1].revents != 0) return;
    const OwnedFd peer(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!peer) continue;
    try {
      if (bridge::other_user(bridge::peer_of(peer.get()))) continue;
      const auto deadline = Clock::now() + kRequestLimit;
      const std::optional<bridge::Frame> request = bridge::receive_frame(peer.get(), deadline);
      if (!request) continue;
      const MemoryFrame asked = decode_memory_frame(request->body);
      const auto* use = std::get_if<MemoryUse>(&asked);
      if (use == nullptr) continue;
      std::optional<OwnedFd> copy = received_.copy_of(use->memory);
      if (!copy) continue;  // closed without an answer
      std::vector<OwnedFd> fds;
      fds.push_back(std::move(*copy));
      bridge::send_frame(peer.get(), request->body, std::move(fds), deadline);
    } catch (const Error&) {
      // The peer sees a closed connection, and reports that.
    }
  }
}

}  // namespace rollpack::rollout
