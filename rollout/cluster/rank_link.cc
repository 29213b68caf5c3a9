#include "rollout/cluster/rank_link.h"

#include <signal.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <variant>

#include <fmt/format.h>

#include "kernels/base/error.h"
#include "kernels/base/fault_point.h"
#include "rollout/cluster/message_codec.h"
#include "rollout/cluster/replacement.h"
#include "rollout/node_bridge/node_messages.h"
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

// A frame without descriptors, with something that happens in the middle of it.
template <class Middle>
void send_in_halves(int socket, const std::vector<uint8_t>& body, const Middle& middle) {
  std::vector<uint8_t> bytes(4 + body.size());
  for (size_t i = 0; i < 4; ++i) bytes[i] = static_cast<uint8_t>(body.size() >> (8 * i));
  std::copy(body.begin(), body.end(), bytes.begin() + 4);
  auto send_up_to = [&, sent = size_t{0}](size_t end) mutable {
    while (sent < end) {
      const ssize_t put = ::send(socket, bytes.data() + sent, end - sent, MSG_NOSIGNAL);
      if (put <= 0) {
        throw Error({.code = ErrorCode::kUnavailable,
                     .field = "rank socket",
                     .value = "to rank 0",
                     .message = fmt::format("send: {}", std::strerror(errno))});
      }
      sent += static_cast<size_t>(put);
    }
  };
  send_up_to(bytes.size() / 2);
  middle();
  send_up_to(bytes.size());
}

}  // namespace

// One worker as the dispatcher sees it. Lives on the hub's thread; send() and kill() may come from
// any.
class RankHub::Link : public WorkerLink, public std::enable_shared_from_this<Link> {
 public:
  // `peer` is asked for by the caller: of a socket pair the kernel only knows who made it.
  Link(bridge::asio::io_context& io, bridge::Peer peer, OwnedFd fd, int rank_on_node, bool is_child)
      : io_(io),
        peer_(std::move(peer)),
        rank_on_node_(rank_on_node),
        is_child_(is_child),
        process_(io) {
    if (peer_.pidfd) process_.assign(OwnedFd::duplicate(peer_.pidfd.get()).release());
    socket_ = std::make_shared<bridge::FrameSocket>(
        io, std::move(fd), bridge::FrameSocketOptions{.max_queued_bytes = kMaxQueuedBytes});
  }
  // To a rank of another node, by TCP: there is no process that could be watched or killed.
  Link(bridge::asio::io_context& io, AcceptedRank rank, RemoteNode& node, const Options& options)
      : io_(io),
        host_(std::move(rank.host)),
        relay_(std::move(rank.relay)),
        node_(&node),
        on_lost_host_(options.on_lost_host),
        is_child_(false),
        process_(io) {
    const std::chrono::milliseconds lease = options.lease;
    watch_tcp(rank.socket.get(), lease);
    socket_ = std::make_shared<bridge::FrameSocket>(
        io, std::move(rank.socket),
        bridge::FrameSocketOptions{.max_queued_bytes = kMaxQueuedBytes, .frame_deadline = lease});
  }

  void send(Command command) override {
    bridge::asio::post(
        io_, [self = shared_from_this(), shared = std::make_shared<Command>(std::move(command))] {
          if (self->node_ != nullptr) return self->node_->send(self->worker_, std::move(*shared));
          Frame frame = encode(*shared);
          self->socket_->send(std::move(frame.body), std::move(frame.fds));
        });
  }
  void send_body(std::vector<uint8_t> body) { socket_->send(std::move(body)); }

  bool is_own_process() const override { return true; }
  int node() const override { return node_ == nullptr ? 0 : node_->number(); }
  int rank_on_node() const override { return rank_on_node_; }
  const TcpEndpoint& relay() const { return relay_; }

  // The socket stays open until the process is gone: what it has said before is dropped by the
  // ledger, which counts it. On another node the end of its link ends a rank.
  void kill() override {
    bridge::asio::post(io_, [self = shared_from_this()] {
      if (fault_at(FaultPoint::kWorkerGivenUp)) return;
      const int process = self->peer_.pidfd.get();
      if (process >= 0) ::syscall(SYS_pidfd_send_signal, process, SIGKILL, nullptr, 0);
      if (self->node_ != nullptr) self->leave_node();
    });
  }

  void start(RankHub& hub, Dispatcher& dispatcher, int32_t worker) {
    worker_ = worker;
    if (node_ != nullptr) node_->add_rank(worker, relay_);
    socket_->start(
        [this, &hub, &dispatcher, worker](Frame frame) {
          try {
            if (hub.hear_node_ && is_node_frame(frame.body)) {
              return hub.hear_node_(worker, std::move(frame.body));
            }
            if (node_ != nullptr && is_memory_frame(frame.body)) return hear_of_memory(frame);
            Event event = decode_event(frame);
            if (const auto* ack = std::get_if<Ack>(&event); ack != nullptr && node_ != nullptr) {
              node_->handle(worker, *ack);
            }
            dispatcher.handle(worker, std::move(event));
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
    dispatcher.lose_worker(worker,
                           {.code = ErrorCode::kUnavailable,
                            .field = fmt::format("rank {}", worker),
                            .value = "gone",
                            .origin = host_.empty() ? "" : "host " + host_,
                            .message = broken          ? format_error(*broken)
                                       : host_.empty() ? "its process ended without a word"
                                                       : "its connection ended without a word"});
    const auto self = shared_from_this();
    socket_->close();
    // Later: the node may be the one that was just sending.
    if (node_ != nullptr) bridge::asio::post(io_, [self] { self->leave_node(); });
    if (!is_child_) bury();
  }

  void hear_of_memory(const Frame& frame) {
    const MemoryFrame heard = decode_memory_frame(frame.body);
    if (const auto* state = std::get_if<MemoryState>(&heard)) node_->handle(worker_, *state);
  }

  // What has not gone out is dropped; the rank ends when it sees the reset, at once or when the
  // network is there again.
  void leave_node() {
    if (socket_->is_open()) {
      reset_on_close(socket_->native_handle());
      socket_->close();
    }
    node_->lose_rank(worker_);
    if (on_lost_host_) on_lost_host_();
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
  const std::string host_;            // of another node
  const TcpEndpoint relay_;           // likewise
  RemoteNode* const node_ = nullptr;  // likewise
  std::function<void()> on_lost_host_;
  int32_t worker_ = 0;
  const int rank_on_node_ = 0;  // of this node
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

RankHub::RankHub(std::vector<AcceptedRank> ranks, Options options)
    : options_(std::move(options)), ranks_(std::move(ranks)) {
  const int num_expected = options_.num_ranks - 1;
  const auto num_missing = num_expected - static_cast<int>(ranks_.size());
  if (num_missing == 0 || options_.may_miss) return;
  throw Error({.code = ErrorCode::kDeadlineExceeded,
               .field = "ranks",
               .value = fmt::format("{} of {} connected", options_.num_ranks - num_missing,
                                    options_.num_ranks),
               .message = "the others did not reach rank 0 in time"});
}

RankHub::~RankHub() {
  io_.stop();
  if (thread_.joinable()) thread_.join();
}

RemoteNode& RankHub::remote_node(Dispatcher& dispatcher, int node) {
  std::unique_ptr<RemoteNode>& place = nodes_[node];
  if (!place) {
    place = std::make_unique<RemoteNode>(
        RemoteNode::Actions{
            .transmit =
                [this](int32_t rank, std::vector<uint8_t> body) {
                  links_[rank]->send_body(std::move(body));
                },
            .tell_progress =
                [&dispatcher](int32_t rank) { dispatcher.handle(rank, StepProgress{}); },
            .answer = [&dispatcher](int32_t rank,
                                    Ack ack) { dispatcher.handle(rank, std::move(ack)); }},
        outgoing_, node);
  }
  return *place;
}

void RankHub::serve(Dispatcher& dispatcher) {
  links_.resize(static_cast<size_t>(options_.num_ranks));  // [0] stays empty: it needs no link
  for (AcceptedRank& each : ranks_) {
    std::shared_ptr<Link>& link = links_[static_cast<size_t>(each.rank)];
    if (each.is_remote) {
      RemoteNode& node =
          remote_node(dispatcher, options_.node_of_rank.at(static_cast<size_t>(each.rank)));
      link = std::make_shared<Link>(io_, std::move(each), node, options_);
    } else {
      bridge::Peer peer = bridge::peer_of(each.socket.get());
      link = std::make_shared<Link>(io_, std::move(peer), std::move(each.socket),
                                    rank_on_first_node(each.rank), /*is_child=*/false);
    }
  }
  ranks_.clear();
  for (int rank = 1; rank < options_.num_ranks; ++rank) {
    if (links_[rank]) {
      links_[rank]->start(*this, dispatcher, dispatcher.add_worker(links_[rank]));
    } else {
      dispatcher.lose_worker(dispatcher.add_worker(std::make_shared<NoLink>()),
                             {.code = ErrorCode::kDeadlineExceeded,
                              .field = fmt::format("rank {}", rank),
                              .value = "not connected",
                              .message = "it did not reach rank 0 in time"});
    }
  }
  // Often enough that a worker which stands still costs its lease and at most a second more.
  watch_leases(dispatcher, std::min(options_.lease / 8, std::chrono::milliseconds(250)));
  thread_ = std::thread([this] {
    const auto stay = bridge::asio::make_work_guard(io_);
    io_.run();
  });
}

int RankHub::rank_on_first_node(int rank) const {
  const std::vector<int>& nodes = options_.node_of_rank;
  return nodes.empty() ? rank
                       : static_cast<int>(std::count(nodes.begin(), nodes.begin() + rank, 0));
}

void RankHub::send_node_frame(int32_t worker, std::vector<uint8_t> frame) {
  bridge::asio::post(io_, [this, worker, frame = std::move(frame)]() mutable {
    if (const auto& link = links_[static_cast<size_t>(worker)]) link->send_body(std::move(frame));
  });
}

TcpEndpoint RankHub::endpoint_of(int32_t worker) const {
  const auto& link = links_.at(static_cast<size_t>(worker));
  return link ? link->relay() : TcpEndpoint{};
}

// On the hub's thread, which lives as long as the job: children die with the thread that made them.
void RankHub::start_replacement(Dispatcher& dispatcher, int rank_on_node, const std::string& line) {
  bridge::asio::post(io_, [this, &dispatcher, rank_on_node, line] {
    try {
      Child child = start_child(static_cast<int>(links_.size()), rank_on_node,
                                options_.num_ranks_on_node, line);
      links_.push_back(std::make_shared<Link>(
          io_, bridge::Peer{.pid = child.pid, .pidfd = std::move(child.process)},
          std::move(child.socket), rank_on_node, /*is_child=*/true));
      links_.back()->start(*this, dispatcher, dispatcher.add_replacement(links_.back()));
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
    if (on_lease_check_) on_lease_check_();
    // Well before the lease of those who wait.
    for (const auto& [number, node] : nodes_) node->check_feeder(Clock::now(), options_.lease / 3);
    watch_leases(dispatcher, period);
  });
}

void RankClient::relay(TcpListener listener, const Meeting& meeting,
                       std::chrono::milliseconds limit) {
  relay_ = std::make_unique<MemoryRelay>(
      memory_->received(), std::move(listener),
      MemoryRelay::Options{.token = meeting.token,
                           .reply = meeting.answer,
                           .limit = limit,
                           .answer = [this](MemoryState state) { send_body(encode(state)); }});
}

void RankClient::send_body(std::vector<uint8_t> body) {
  const std::lock_guard lock(send_mutex_);
  // Rank 0 reads on a thread that never computes: a minute of a full socket means that it is stuck.
  bridge::send_frame(socket_.get(), std::move(body), {}, Clock::now() + std::chrono::minutes(1));
}

void RankClient::send(const Event& event) {
  std::vector<uint8_t> body = encode(event).body;
  const bool is_sample = std::holds_alternative<SampleDone>(event);
  if (is_sample && is_fault_armed(FaultPoint::kSampleCutOff)) {
    const std::lock_guard lock(send_mutex_);
    send_in_halves(socket_.get(), body, [] { fault_at(FaultPoint::kSampleCutOff); });
  } else {
    send_body(std::move(body));
  }
  if (is_sample) fault_at(FaultPoint::kSampleSent);
}

std::optional<Command> RankClient::receive() {
  for (;;) {
    std::optional<Frame> frame = bridge::receive_frame(socket_.get(), Clock::time_point::max());
    if (!frame) return std::nullopt;
    if (memory_ && is_memory_frame(frame->body)) {
      take(decode_memory_frame(frame->body));
      continue;
    }
    if (hear_node_ && is_node_frame(frame->body)) {
      hear_node_(std::move(frame->body));
      continue;
    }
    if (next_error_) {
      // The command cannot be carried out, and is answered all the same.
      const uint64_t ticket = bridge::decode_message(frame->body).at("ticket");
      send(Ack{.ticket = ticket, .error = std::exchange(next_error_, std::nullopt)});
      continue;
    }
    if (next_fd_) frame->fds.push_back(std::move(*std::exchange(next_fd_, std::nullopt)));
    return decode_command(std::move(*frame));
  }
}

void RankClient::take(const MemoryFrame& frame) {
  if (const auto* piece = std::get_if<MemoryPiece>(&frame)) {
    if (auto state = memory_->received().write(*piece)) send_body(encode(*state));
  } else if (const auto* use = std::get_if<MemoryUse>(&frame)) {
    try {
      next_fd_ = memory_->find(*use);
    } catch (const Error& error) {
      next_error_ = error.info;
    }
  } else if (const auto* end = std::get_if<MemoryEnd>(&frame)) {
    memory_->received().drop(end->memory);
  } else if (const auto* order = std::get_if<MemoryForward>(&frame); order != nullptr && relay_) {
    relay_->forward(*order);
  }
}

}  // namespace rollpack::rollout
