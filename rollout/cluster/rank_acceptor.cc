#include "rollout/cluster/rank_acceptor.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "kernels/base/error.h"
#include "rollout/cluster/handshake.h"

namespace rollpack::rollout {
namespace {

using bridge::Frame;
using bridge::OwnedFd;
using Clock = std::chrono::steady_clock;

// Connections that have not said who they are: more wait in the kernel's queue.
constexpr size_t kMaxStrangers = 256;
constexpr std::chrono::seconds kHelloLimit{5};
constexpr std::chrono::milliseconds kAskInterval{100};
// One address of several: a host that drops packets must not use up the time of the next one.
constexpr std::chrono::seconds kAddressLimit{5};

sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{.sun_family = AF_UNIX, .sun_path = {}};
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

std::string host_name() {
  char name[HOST_NAME_MAX + 1] = {};
  ::gethostname(name, sizeof name - 1);
  return name;
}

// Without a port nobody relays through this rank: what is for it comes from rank 0.
std::optional<TcpListener> try_listen(const TcpListenOptions& options) {
  try {
    return listen_tcp(options);
  } catch (const Error&) {
    return std::nullopt;
  }
}

void check_answer(int socket, const Meeting& meeting, Clock::time_point deadline) {
  const std::optional<Frame> frame = bridge::receive_frame(socket, deadline);
  if (frame && is_answer(frame->body, meeting.answer)) return;
  throw Error({.code = ErrorCode::kUnavailable,
               .field = "rank 0",
               .value = frame ? "another program" : "closed",
               .allowed = "rank 0 of this job"});
}

}  // namespace

RankAcceptor::RankAcceptor(const Meeting& meeting, OwnedFd tcp, int num_ranks)
    : meeting_(meeting),
      num_ranks_(num_ranks),
      tcp_(std::move(tcp)),
      accepted_(static_cast<size_t>(num_ranks)) {
  const sockaddr_un address = address_of(meeting_.socket);
  unix_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!unix_) fail_call("socket", meeting_.socket);
  if (::bind(unix_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    fail_call("bind", meeting_.socket);
  }
  if (::listen(unix_.get(), SOMAXCONN) != 0) fail_call("listen", meeting_.socket);
}

RankAcceptor::~RankAcceptor() {
  ::unlink(meeting_.socket.c_str());
}

std::vector<AcceptedRank> RankAcceptor::accept(Clock::time_point deadline,
                                               const std::function<bool()>& gives_up) {
  while (num_accepted_ < num_ranks_ - 1 && Clock::now() < deadline && !gives_up()) {
    std::erase_if(strangers_,
                  [](const Stranger& stranger) { return stranger.deadline < Clock::now(); });
    const bool has_room = strangers_.size() < kMaxStrangers;
    std::vector<pollfd> waiting = {
        {.fd = has_room ? unix_.get() : -1, .events = POLLIN, .revents = 0},
        {.fd = has_room && tcp_ ? tcp_.get() : -1, .events = POLLIN, .revents = 0}};
    Clock::time_point wake = std::min(deadline, Clock::now() + kAskInterval);
    for (const Stranger& stranger : strangers_) {
      waiting.push_back({.fd = stranger.socket.get(), .events = POLLIN, .revents = 0});
      wake = std::min(wake, stranger.deadline);
    }
    if (::poll(waiting.data(), waiting.size(), bridge::milliseconds_until(wake)) <= 0) continue;
    size_t index = 2;
    std::erase_if(strangers_, [&](Stranger& stranger) {
      return waiting[index++].revents != 0 && listen_to(stranger);
    });
    if (waiting[0].revents != 0) admit(unix_.get(), /*is_remote=*/false);
    if (waiting[1].revents != 0) admit(tcp_.get(), /*is_remote=*/true);
  }
  std::vector<AcceptedRank> ranks;
  for (std::optional<AcceptedRank>& each : accepted_) {
    if (each) ranks.push_back(std::move(*each));
  }
  return ranks;
}

void RankAcceptor::admit(int listener, bool is_remote) {
  OwnedFd socket(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!socket) return;
  strangers_.push_back({.socket = std::move(socket),
                        .is_remote = is_remote,
                        .deadline = Clock::now() + kHelloLimit,
                        .reader = {}});
}

// A connection that breaks, or is not of this job, counts as one that never came.
bool RankAcceptor::listen_to(Stranger& stranger) {
  try {
    const bridge::IoStatus status = stranger.reader.read(stranger.socket.get());
    if (status == bridge::IoStatus::kWouldBlock) return false;
    if (status == bridge::IoStatus::kDone) greet(stranger, stranger.reader.take());
  } catch (const std::exception&) {
  }
  return true;
}

void RankAcceptor::greet(Stranger& stranger, const Frame& frame) {
  std::optional<Hello> hello = decode_hello(frame.body, meeting_.token);
  if (!hello || hello->rank < 1 || hello->rank >= num_ranks_) return;
  if (stranger.is_remote) {
    bridge::send_frame(stranger.socket.get(), encode_answer(meeting_.answer), {},
                       stranger.deadline);
  }
  // A rank that has waited too long for the answer comes once more, by another address.
  std::optional<AcceptedRank>& place = accepted_[static_cast<size_t>(hello->rank)];
  if (!place) ++num_accepted_;
  place = AcceptedRank{.rank = hello->rank,
                       .is_remote = stranger.is_remote,
                       .host = std::move(hello->host),
                       .relay = std::move(hello->relay),
                       .socket = std::move(stranger.socket)};
}

OwnedFd connect_on_this_node(const Meeting& meeting, int rank, Clock::time_point deadline) {
  const sockaddr_un address = address_of(meeting.socket);
  OwnedFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket) fail_call("socket", meeting.socket);
  // Rank 0 listens before it tells the path, so there is nothing to wait for.
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    fail_call("connect", meeting.socket);
  }
  bridge::send_frame(socket.get(), encode_hello({.rank = rank, .host = host_name()}, meeting.token),
                     {}, deadline);
  return socket;
}

RemoteConnection connect_from_other_node(const Meeting& meeting, int rank, TcpListenOptions relay,
                                         Clock::time_point deadline) {
  std::vector<std::string> reasons;
  for (const std::string& address : meeting.endpoint.addresses) {
    const auto limit = std::min(deadline, Clock::now() + kAddressLimit);
    try {
      RemoteConnection made{.socket = connect_tcp(address, meeting.endpoint.port, limit)};
      relay.interface = own_address(made.socket.get());
      made.relay = try_listen(relay);
      Hello hello{.rank = rank, .host = host_name()};
      if (made.relay) {
        hello.relay = {.addresses = {relay.interface}, .port = made.relay->endpoint.port};
      }
      bridge::send_frame(made.socket.get(), encode_hello(hello, meeting.token), {}, limit);
      check_answer(made.socket.get(), meeting, limit);
      return made;
    } catch (const Error& error) {
      reasons.push_back(format_error(error.info));
    }
  }
  throw Error({.code = ErrorCode::kUnavailable,
               .field = fmt::format("rank {} on {}", rank, host_name()),
               .value = "cannot reach rank 0",
               .allowed = "a TCP connection to one of its addresses; cluster.interface and "
                          "cluster.port choose others",
               .message = fmt::format("{}", fmt::join(reasons, "; "))});
}

}  // namespace rollpack::rollout
