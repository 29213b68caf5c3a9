#include "rollout/node_bridge/sample_inlet.h"

#include <sys/socket.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "kernels/base/error.h"
#include "rollout/cluster/abstract_address.h"
#include "rollout/node_bridge/sample_frame.h"
#include "trainer_bridge/wire/peer.h"

namespace rollpack::rollout {
namespace {

using bridge::OwnedFd;

std::string name_of(const std::string& job, int rank) {
  return fmt::format("rollpack-samples-{}-{}", job.substr(0, 64), rank);
}

[[noreturn]] void fail_call(const char* call) {
  throw Error({.code = ErrorCode::kUnavailable,
               .field = "socket for samples of the node",
               .message = fmt::format("{}: {}", call, std::strerror(errno))});
}

}  // namespace

SampleInlet::SampleInlet(const std::string& job, int rank, KeptStore& store) : store_(store) {
  const AbstractAddress address(name_of(job, rank));
  OwnedFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!listener) fail_call("socket");
  if (::bind(listener.get(), address.get(), address.size()) != 0) fail_call("bind");
  if (::listen(listener.get(), SOMAXCONN) != 0) fail_call("listen");
  listener_.assign(listener.release());
  wait();
  thread_ = std::thread([this] { io_.run(); });
}

SampleInlet::~SampleInlet() {
  io_.stop();
  thread_.join();
}

void SampleInlet::wait() {
  listener_.async_wait(bridge::asio::posix::stream_descriptor::wait_read,
                       [this](bridge::SystemError error) {
                         if (error) return;
                         admit_next();
                         wait();
                       });
}

// A connection is one rank's; what it sends is taken in whatever the trainer does.
struct SampleInlet::Link {
  int32_t worker = -1;  // -1: it has said nothing yet
  bool is_remote = false;
  uint64_t num_samples = 0;
  std::weak_ptr<bridge::FrameSocket> socket;  // whose callbacks keep this
};

void SampleInlet::admit_next() {
  OwnedFd peer(::accept4(listener_.native_handle(), nullptr, nullptr, SOCK_CLOEXEC));
  if (!peer || bridge::other_user(bridge::peer_of(peer.get()))) return;
  serve(std::make_shared<Link>(), std::move(peer));
}

void SampleInlet::admit(int32_t worker, OwnedFd socket) {
  const auto shared = std::make_shared<OwnedFd>(std::move(socket));
  bridge::asio::post(io_, [this, worker, shared] {
    store_.begin(worker);
    if (num_remote_links_ == kMaxRemoteLinks) return store_.end(worker);
    ++num_remote_links_;
    serve(std::make_shared<Link>(Link{.worker = worker, .is_remote = true, .socket = {}}),
          std::move(*shared));
  });
}

void SampleInlet::serve(std::shared_ptr<Link> link, OwnedFd peer) {
  const auto socket = std::make_shared<bridge::FrameSocket>(
      io_, std::move(peer), bridge::FrameSocketOptions{.frame_deadline = {}});
  link->socket = socket;
  const auto end = [this, link](const std::optional<ErrorInfo>& error) {
    const auto ended = link->socket.lock();
    if (!ended || !ended->is_open()) return;
    if (error) spdlog::warn("samples of rank {}: {}", link->worker, format_error(*error));
    if (link->worker >= 0) store_.end(link->worker);
    if (link->is_remote) --num_remote_links_;
    ended->close();
  };
  socket->start(
      [this, link, end](bridge::Frame frame) {
        try {
          take(*link, std::move(frame.body));
        } catch (const Error& error) {
          end(error.info);
        }
      },
      end);
}

void SampleInlet::take(Link& link, std::vector<uint8_t> body) {
  SampleFrame taken = decode_sample_frame(std::move(body));
  if (link.worker < 0) {
    link.worker = taken.worker;
    store_.begin(link.worker);
  }
  store_.keep(taken.worker, taken.attempt, std::move(taken.sample));
  ++link.num_samples;
  const auto socket = link.socket.lock();
  if (link.is_remote && socket) socket->send(encode_receipt(link.num_samples));
}

bool SampleOutlet::put(const std::vector<uint8_t>& frame) {
  const std::lock_guard lock(mutex_);
  if (is_broken_) return false;
  try {
    if (!socket_) {
      const AbstractAddress address(name_of(job_, bridge_rank_));
      socket_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
      if (!socket_) fail_call("socket");
      if (::connect(socket_.get(), address.get(), address.size()) != 0) fail_call("connect");
      if (const auto stranger = bridge::other_user(bridge::peer_of(socket_.get()))) {
        throw Error(*stranger);
      }
    }
    bridge::send_frame(socket_.get(), frame, {}, std::chrono::steady_clock::now() + limit_);
    return true;
  } catch (const Error& error) {
    spdlog::warn("samples for this node's bridge go through rank 0: {}", format_error(error.info));
    is_broken_ = true;
    socket_.reset();
    return false;
  }
}

}  // namespace rollpack::rollout
