#include "rollout/cluster/rank_link.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include <fmt/format.h>

#include "kernels/base/error.h"
#include "rollout/cluster/message_codec.h"
#include "trainer_bridge/wire/message.h"

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

int milliseconds_until(Clock::time_point deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
  return static_cast<int>(std::max<int64_t>(0, left.count()));
}

}  // namespace

// One worker as the dispatcher sees it. Lives on the hub's thread; send() may come from any.
class RankHub::Link : public WorkerLink, public std::enable_shared_from_this<Link> {
 public:
  Link(bridge::asio::io_context& io, OwnedFd fd)
      : io_(io),
        socket_(std::make_shared<bridge::FrameSocket>(
            io, std::move(fd), bridge::FrameSocketOptions{.max_queued_bytes = kMaxQueuedBytes})) {}

  void send(Command command) override {
    bridge::asio::post(
        io_, [self = shared_from_this(), shared = std::make_shared<Command>(std::move(command))] {
          Frame frame = encode(*shared);
          self->socket_->send(std::move(frame.body), std::move(frame.fds));
        });
  }

  void start(Dispatcher& dispatcher, int32_t worker) {
    socket_->start(
        [this, &dispatcher, worker](Frame frame) {
          try {
            dispatcher.handle(worker, decode_event(frame));
          } catch (const Error& error) {
            dispatcher.lose_worker(worker, error.info);
            socket_->close();
          }
        },
        [&dispatcher, worker](std::optional<ErrorInfo> broken) {
          dispatcher.lose_worker(worker, {.code = ErrorCode::kUnavailable,
                                          .field = fmt::format("rank {}", worker),
                                          .value = "gone",
                                          .message = broken ? format_error(*broken)
                                                            : "its process ended without a word"});
        });
  }

 private:
  bridge::asio::io_context& io_;
  std::shared_ptr<bridge::FrameSocket> socket_;
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

void RankHub::connect(Dispatcher& dispatcher, int num_ranks, Clock::time_point deadline) {
  links_.resize(num_ranks);  // [0] stays empty: rank 0's worker needs no link
  for (int num_connected = 1; num_connected < num_ranks; ++num_connected) {
    pollfd waiting{.fd = listener_, .events = POLLIN};
    OwnedFd fd(::poll(&waiting, 1, milliseconds_until(deadline)) > 0
                   ? ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)
                   : -1);
    if (!fd) {
      throw Error({.code = ErrorCode::kDeadlineExceeded,
                   .field = "ranks",
                   .value = fmt::format("{} of {} connected", num_connected, num_ranks),
                   .message = "the others did not reach rank 0 in time"});
    }
    const std::optional<Frame> hello = bridge::receive_frame(fd.get(), deadline);
    if (!hello) fail_call("hello", path_);
    const int rank = bridge::decode_message(hello->body).at("rank").get<int>();
    if (rank < 1 || rank >= num_ranks || links_[rank]) fail_invariant("a rank connected twice");
    links_[rank] = std::make_shared<Link>(io_, std::move(fd));
  }
  ::unlink(path_.c_str());
  for (int rank = 1; rank < num_ranks; ++rank) {
    links_[rank]->start(dispatcher, dispatcher.add_worker(links_[rank]));
  }
  thread_ = std::thread([this] {
    const auto stay = bridge::asio::make_work_guard(io_);
    io_.run();
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
  const std::lock_guard lock(send_mutex_);
  // Rank 0 reads on a thread that never computes: a minute of a full socket means that it is stuck.
  bridge::send_frame(socket_, std::move(frame.body), std::move(frame.fds),
                     Clock::now() + std::chrono::minutes(1));
}

std::optional<Command> RankClient::receive() {
  std::optional<Frame> frame = bridge::receive_frame(socket_, Clock::time_point::max());
  if (!frame) return std::nullopt;
  return decode_command(std::move(*frame));
}

}  // namespace rollpack::rollout
