#include "rollout/cluster/rank_link.h"

#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include <fmt/format.h>

#include "kernels/base/error.h"
#include "kernels/base/fault_point.h"
#include "rollout/cluster/message_codec.h"
#include "rollout/cluster/replacement.h"
#include "trainer_bridge/wire/message.h"
#include "trainer_bridge/wire/peer.h"

namespace rollpack::rollout {
namespace {

using bridge::Frame;
using bridge::OwnedFd;
using Clock = std::chrono::steady_clock;

// Commands to one worker that its socket has not taken yet: weights travel as descriptors, so this
// much only piles up behind a worker that is stuck.
constexpr size_t kMaxQueuedBytes = size_t{256} << 20;

sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{.sun_family = AF_UNIX};
  if (path.size() >= sizeof(address.sun_path)) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "TMPDIR",
                 .value = path,
                 .allowed = fmt::format("a path of at most {} bytes", sizeof(address.sun_path) - 1),
                 .message = "Unix sockets take no longer one"});
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

[[noreturn]] void fail_call(const char* call, const std::string& path) {
  throw Error({.code = ErrorCode::kUnavailable,
               .field = "rank socket",
               .value = path,
               .message = fmt::format("{}: {}", call, std::strerror(errno))});
}

// A frame without descriptors, with something that happens in the middle of it.
template <class Middle>
void send_in_halves(int socket, const std::vector<uint8_t>& body, const Middle& middle) {
  std::vector<uint8_t> bytes(4);
  for (size_t i = 0; i < 4; ++i) bytes[i] = static_cast<uint8_t>(body.size() >> (8 * i));
  bytes.insert(bytes.end(), body.begin(), body.end());
  auto send_up_to = [&, sent = size_t{0}](size_t end) mutable {
    while (sent < end) {
      const ssize_t put = ::send(socket, bytes.data() + sent, end - sent, MSG_NOSIGNAL);
      if (put <= 0) fail_call("send", "to rank 0");
      sent += static_cast<size_t>(put);
    }
  };
  send_up_to(bytes.size() / 2);
  middle();
  send_up_to(bytes.size());
}

int milliseconds_until(Clock::time_point deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
  return static_cast<int>(std::max<int64_t>(0, left.count()));
}

}  // namespace

// One worker as the dispatcher sees it. Lives on the hub's thread; send() and kill() may come from
// any.
class RankHub::Link : public WorkerLink, public std::enable_shared_from_this<Link> {
 public:
  // `peer` is asked for by the caller: of a socket pair the kernel only knows who made it.
  Link(bridge::asio::io_context& io, bridge::Peer peer, OwnedFd fd, bool is_child)
      : io_(io), peer_(std::move(peer)), is_child_(is_child), process_(io) {
    if (peer_.pidfd) process_.assign(OwnedFd::duplicate(peer_.pidfd.get()).release());
    socket_ = std::make_shared<bridge::FrameSocket>(
        io, std::move(fd), bridge::FrameSocketOptions{.max_queued_bytes = kMaxQueuedBytes});
  }

  void send(Command command) override {
    bridge::asio::post(
        io_, [self = shared_from_this(), shared = std::make_shared<Command>(std::move(command))] {
          Frame frame = encode(*shared);
          self->socket_->send(std::move(frame.body), std::move(frame.fds));
        });
  }

  bool is_own_process() const override { return true; }

  // The socket stays open until the process is gone: what it has said before is dropped by the
  // ledger, which counts it.
  void kill() override {
    bridge::asio::post(io_, [self = shared_from_this()] {
      if (fault_at(FaultPoint::kWorkerGivenUp)) return;
      const int process = self->peer_.pidfd.get();
      if (process >= 0) ::syscall(SYS_pidfd_send_signal, process, SIGKILL, nullptr, 0);
    });
  }

  void start(Dispatcher& dispatcher, int32_t worker) {
    socket_->start(
        [this, &dispatcher, worker](Frame frame) {
          try {
            dispatcher.handle(worker, decode_event(frame));
          } catch (const Error& error) {
            end(dispatcher, worker, error.info);
          }
        },
        [this, &dispatcher, worker](std::optional<ErrorInfo> broken) {
          end(dispatcher, worker, std::move(broken));
        });
    if (!process_.is_open()) return;
    process_.async_wait(
        bridge::asio::posix::stream_descriptor::wait_read,
        [self = shared_from_this(), &dispatcher, worker](bridge::SystemError error) {
          if (error) return;
          self->socket_->drain();  // what it said last still counts
          self->end(dispatcher, worker, std::nullopt);
          self->bury();
        });
  }

 private:
  void end(Dispatcher& dispatcher, int32_t worker, std::optional<ErrorInfo> broken) {
    dispatcher.lose_worker(
        worker, {.code = ErrorCode::kUnavailable,
                 .field = fmt::format("rank {}", worker),
                 .value = "gone",
                 .message = broken ? format_error(*broken) : "its process ended without a word"});
    const auto self = shared_from_this();
    socket_->close();
    if (!is_child_) bury();
  }

  // A child stays a zombie until it is waited for, so its end is awaited even when its socket ended
  // first; ranks are mpirun's children.
  void bury() {
    siginfo_t info{};
    if (is_child_)
      ::waitid(P_PIDFD, static_cast<id_t>(peer_.pidfd.get()), &info, WEXITED | WNOHANG);
    bridge::SystemError ignored;
    process_.close(ignored);
    peer_.pidfd.reset();
  }

  bridge::asio::io_context& io_;
  bridge::Peer peer_;
  const bool is_child_;
  bridge::asio::posix::stream_descriptor process_;  // the peer's pidfd, watched
  std::shared_ptr<bridge::FrameSocket> socket_;
};

// Stands for a rank that never came.
class RankHub::NoLink : public WorkerLink {
 public:
  void send(Command) override {}
  bool is_own_process() const override { return true; }
};

RankHub::RankHub(const std::string& path) : path_(path) {
  const sockaddr_un address = address_of(path);
  listener_ = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (listener_ < 0) fail_call("socket", path);
  if (::bind(listener_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    fail_call("bind", path);
  }
  if (::listen(listener_, SOMAXCONN) != 0) fail_call("listen", path);
}

RankHub::~RankHub() {
  io_.stop();
  if (thread_.joinable()) thread_.join();
  if (listener_ >= 0) ::close(listener_);
  ::unlink(path_.c_str());
}

// A connection that breaks before it has said who it is counts as one that never came.
void RankHub::accept_ranks(const ConnectOptions& options) {
  links_.resize(options.num_ranks);  // [0] stays empty: rank 0's worker needs no link
  for (int num_connected = 1; num_connected < options.num_ranks;) {
    pollfd waiting{.fd = listener_, .events = POLLIN};
    if (::poll(&waiting, 1, milliseconds_until(options.deadline)) <= 0) return;
    OwnedFd fd(::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd) continue;
    try {
      const std::optional<Frame> hello = bridge::receive_frame(fd.get(), options.deadline);
      if (!hello) continue;
      const int rank = bridge::decode_message(hello->body).at("rank").get<int>();
      if (rank < 1 || rank >= options.num_ranks || links_[rank]) {
        fail_invariant("a rank connected twice");
      }
      bridge::Peer peer = bridge::peer_of(fd.get());
      links_[rank] =
          std::make_shared<Link>(io_, std::move(peer), std::move(fd), /*is_child=*/false);
      ++num_connected;
    } catch (const Error& error) {
      if (error.info.code == ErrorCode::kInternal) throw;
    }
  }
}

void RankHub::connect(Dispatcher& dispatcher, const ConnectOptions& options) {
  num_ranks_ = options.num_ranks;
  accept_ranks(options);
  ::unlink(path_.c_str());
  const auto num_missing = std::count(links_.begin() + 1, links_.end(), nullptr);
  if (num_missing > 0 && !options.may_miss) {
    throw Error({.code = ErrorCode::kDeadlineExceeded,
                 .field = "ranks",
                 .value = fmt::format("{} of {} connected", options.num_ranks - num_missing,
                                      options.num_ranks),
                 .message = "the others did not reach rank 0 in time"});
  }
  for (int rank = 1; rank < options.num_ranks; ++rank) {
    if (links_[rank]) {
      links_[rank]->start(dispatcher, dispatcher.add_worker(links_[rank]));
    } else {
      dispatcher.lose_worker(dispatcher.add_worker(std::make_shared<NoLink>()),
                             {.code = ErrorCode::kDeadlineExceeded,
                              .field = fmt::format("rank {}", rank),
                              .value = "not connected",
                              .message = "it did not reach rank 0 in time"});
    }
  }
  // Often enough that a worker which stands still costs its lease and at most a second more.
  watch_leases(dispatcher, std::min(options.lease / 8, std::chrono::milliseconds(250)));
  thread_ = std::thread([this] {
    const auto stay = bridge::asio::make_work_guard(io_);
    io_.run();
  });
}

// On the hub's thread, which lives as long as the job: children die with the thread that made them.
void RankHub::start_replacement(Dispatcher& dispatcher, const std::string& line) {
  bridge::asio::post(io_, [this, &dispatcher, line] {
    try {
      Child child = start_child(static_cast<int>(links_.size()), num_ranks_, line);
      links_.push_back(std::make_shared<Link>(
          io_, bridge::Peer{.pid = child.pid, .pidfd = std::move(child.process)},
          std::move(child.socket), /*is_child=*/true));
      links_.back()->start(dispatcher, dispatcher.add_replacement(links_.back()));
    } catch (const Error& error) {
      dispatcher.replacement_failed(error.info);
    }
  });
}

void RankHub::watch_leases(Dispatcher& dispatcher, std::chrono::milliseconds period) {
  lease_timer_.expires_after(period);
  lease_timer_.async_wait([this, &dispatcher, period](bridge::SystemError error) {
    if (error) return;
    dispatcher.check_leases();
    watch_leases(dispatcher, period);
  });
}

RankClient::RankClient(const std::string& path, int rank, Clock::time_point deadline) {
  const sockaddr_un address = address_of(path);
  socket_ = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (socket_ < 0) fail_call("socket", path);
  // Rank 0 listens before it tells the path, so there is nothing to wait for.
  if (::connect(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    fail_call("connect", path);
  }
  bridge::send_frame(socket_, bridge::encode_message({{"rank", rank}}), {}, deadline);
}

RankClient::~RankClient() {
  ::close(socket_);
}

void RankClient::send(const Event& event) {
  Frame frame = encode(event);
  const bool is_sample = std::holds_alternative<SampleDone>(event);
  const std::lock_guard lock(send_mutex_);
  if (is_sample && is_fault_armed(FaultPoint::kSampleCutOff)) {
    send_in_halves(socket_, frame.body, [] { fault_at(FaultPoint::kSampleCutOff); });
  } else {
    // Rank 0 reads on a thread that never computes: a minute of a full socket means that it is
    // stuck.
    bridge::send_frame(socket_, std::move(frame.body), std::move(frame.fds),
                       Clock::now() + std::chrono::minutes(1));
  }
  if (is_sample) fault_at(FaultPoint::kSampleSent);
}

std::optional<Command> RankClient::receive() {
  std::optional<Frame> frame = bridge::receive_frame(socket_, Clock::time_point::max());
  if (!frame) return std::nullopt;
  return decode_command(std::move(*frame));
}

}  // namespace rollpack::rollout
