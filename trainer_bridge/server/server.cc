#include "trainer_bridge/server/server.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/socket.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <exception>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "trainer_bridge/delivery/delivery.h"
#include "trainer_bridge/server/batch_waiters.h"
#include "trainer_bridge/server/connection.h"
#include "trainer_bridge/server/listen_socket.h"
#include "trainer_bridge/server/sample_inbox.h"
#include "trainer_bridge/server/verbs.h"
#include "trainer_bridge/shared_memory/slot_ring.h"
#include "trainer_bridge/weight_inbox/weight_inbox.h"
#include "trainer_bridge/wire/asio.h"
#include "trainer_bridge/wire/peer.h"

namespace rollpack::bridge {
namespace {

constexpr auto kAcceptRetry = std::chrono::milliseconds(100);
constexpr auto kFlushTime = std::chrono::milliseconds(300);
constexpr auto kFlushPoll = std::chrono::milliseconds(5);

// Outlives the server where a late answer of the service still holds it: what is posted then is
// never run.
struct Loop {
  asio::io_context io{1};
};

// batch_seq counts from 1 in each life of a server that keeps no log; this tells the lives apart.
std::string new_instance() {
  std::random_device random;
  return fmt::format("{:08x}{:08x}", random(), random());
}

ServerOptions checked(ServerOptions options) {
  if (options.slots > kMaxFdsPerFrame) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "bridge.slots",
                 .value = std::to_string(options.slots),
                 .allowed = fmt::format("1 to {}, the descriptors of one frame", kMaxFdsPerFrame)});
  }
  options.frames.finish_deadline = kFlushTime;
  return options;
}

}  // namespace

// Everything but the inbox and the posting is touched by the server's thread only, once it runs.
struct Server::State {
  explicit State(ServerOptions given)
      : options(checked(std::move(given))),
        listener(std::in_place, options.socket),
        layout(make_layout(options.layout)),
        slots(options.slots, options.slot_bytes),
        delivery(slots, *layout),
        waiters(
            loop->io, delivery, [this] { return health(); }, [this] { return advice(); }),
        acceptor(loop->io),
        accept_timer(loop->io),
        flush_timer(loop->io) {}

  void start(RolloutService& given_service);
  void run();
  void stop();
  void put(SampleInbox::Entry entry);
  void deliver_inbox();
  Outcome health() const;
  std::string advice() const;

  void wait_for_clients();
  void accept_clients();
  void add_client(OwnedFd socket);
  void client_gone(Connection& connection);
  void begin_stop();
  void poll_flush(std::chrono::steady_clock::time_point deadline);
  VerbParts verb_parts(RolloutService& given_service);
  std::function<void(std::function<void()>)> poster() const;

  ServerOptions options;  // fixed from start() on
  const std::shared_ptr<Loop> loop = std::make_shared<Loop>();
  std::optional<ListenSocket> listener;  // until stopped
  const std::unique_ptr<BatchLayout> layout;
  SlotRing slots;
  Delivery delivery;
  BatchWaiters waiters;
  SampleInbox inbox;
  asio::posix::stream_descriptor acceptor;
  asio::steady_timer accept_timer;
  asio::steady_timer flush_timer;
  std::unique_ptr<asio::thread_pool> checksums;
  RolloutService* service = nullptr;
  std::unique_ptr<WeightInbox> weights;
  std::unique_ptr<Verbs> verbs;
  std::map<uint64_t, std::shared_ptr<Connection>> connections;  // by client
  std::vector<std::weak_ptr<Connection>> closing;               // still to be flushed at stop
  uint64_t last_client = 0;
  std::optional<int32_t> metrics_port;
  Outcome fault;  // of ours: no batch can be trusted to be complete any more
  std::thread thread;
  std::atomic<bool> is_running = false;
};

std::function<void(std::function<void()>)> Server::State::poster() const {
  return [loop = loop](std::function<void()> task) { asio::post(loop->io, std::move(task)); };
}

VerbParts Server::State::verb_parts(RolloutService& given_service) {
  return {.service = given_service,
          .slots = slots,
          .delivery = delivery,
          .waiters = waiters,
          .weights = *weights,
          .max_held_samples = options.max_held_samples,
          .metrics_port = metrics_port,
          .instance = options.log != nullptr ? options.restored.instance : new_instance(),
          .on_server_thread = poster(),
          .in_order_of_samples =
              [this](std::function<void()> task) {
                if (loop->io.get_executor().running_in_this_thread()) return task();
                put(std::move(task));
              },
          .when_durable =
              [log = options.log, post = poster()](std::function<void(const Outcome&)> then) {
                if (log == nullptr) return then(std::nullopt);
                log->when_durable([post, then = std::move(then)](const Outcome& outcome) {
                  post([then, outcome] { then(outcome); });
                });
              },
          .num_pending_samples = [this] { return inbox.size(); },
          .num_clients = [this] { return static_cast<int64_t>(connections.size()); },
          .health = [this] { return health(); }};
}

void Server::State::start(RolloutService& given_service) {
  if (service != nullptr) fail_invariant("a server was started twice");
  service = &given_service;
  checksums = std::make_unique<asio::thread_pool>(1);
  weights = std::make_unique<WeightInbox>(
      given_service,
      [pool = checksums.get()](std::function<void()> task) { asio::post(*pool, std::move(task)); },
      poster());
  delivery.configure(
      {.max_version_lag = options.max_version_lag,
       .attention_parity_tokens = given_service.info().attention_parity_tokens,
       .weight_version = [&given_service] { return given_service.weight_version(); }});
  if (options.log != nullptr) delivery.restore(*options.log, options.restored);
  verbs = std::make_unique<Verbs>(verb_parts(given_service));
  listener->listen();
  acceptor.assign(OwnedFd::duplicate(listener->fd()).release());
  wait_for_clients();
  asio::post(loop->io, [this] { deliver_inbox(); });  // what came before the start
  is_running = true;
  thread = std::thread([this] { run(); });
}

// An exception here has passed every handler that could answer for it; what it interrupted is
// unknown, so waiting calls and health say so from now on.
void Server::State::run() {
  const auto guard = asio::make_work_guard(loop->io);
  while (!loop->io.stopped()) {
    try {
      loop->io.run();
    } catch (const std::exception& error) {
      fault = ErrorInfo{.code = ErrorCode::kInternal, .field = "server", .message = error.what()};
      spdlog::error("{}", format_error(*fault));
    }
  }
}

void Server::State::put(SampleInbox::Entry entry) {
  const bool is_first = inbox.put(std::move(entry));
  if (is_first) asio::post(loop->io, [this] { deliver_inbox(); });
}

void Server::State::deliver_inbox() {
  for (SampleInbox::Entry& entry : inbox.take_all()) {
    try {
      if (auto* sample = std::get_if<Sample>(&entry)) {
        delivery.commit(std::move(*sample));
      } else if (auto* failed = std::get_if<FailedSample>(&entry)) {
        delivery.fail(std::move(*failed));
      } else {
        std::get<SampleInbox::Task>(entry)();
      }
    } catch (const Error& error) {
      if (!fault) fault = error.info;
    }
  }
  waiters.serve();
}

Outcome Server::State::health() const {
  return fault ? fault : service->health();
}

std::string Server::State::advice() const {
  if (const SleepState sleep = service->sleep_state(); sleep.asleep.any()) {
    return "the engine sleeps: wake_up()";
  } else if (sleep.needs_weights) {
    return "sleep(level=2) has dropped the weights: update_weights() with all tensors";
  }
  const auto version = service->awaited_weight_version();
  if (!version) return "";
  return fmt::format(
      "after the restart generation waits for weights of version {}: update_weights(), or resume() "
      "to go on with version {}",
      *version, service->weight_version());
}

void Server::State::wait_for_clients() {
  acceptor.async_wait(asio::posix::stream_descriptor::wait_read, [this](SystemError error) {
    if (!error) accept_clients();
  });
}

void Server::State::accept_clients() {
  for (;;) {
    OwnedFd socket(
        ::accept4(acceptor.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (socket) {
      add_client(std::move(socket));
      continue;
    }
    if (errno == EINTR || errno == ECONNABORTED) continue;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return wait_for_clients();
    // Out of descriptors or memory: the client stays in the backlog until some are free again.
    accept_timer.expires_after(kAcceptRetry);
    return accept_timer.async_wait([this](SystemError error) {
      if (!error) accept_clients();
    });
  }
}

void Server::State::add_client(OwnedFd socket) {
  Peer peer = peer_of(socket.get());
  const pid_t pid = peer.pid;
  Outcome refusal = other_user(peer);
  if (!refusal && connections.size() >= static_cast<size_t>(options.max_clients)) {
    refusal = ErrorInfo{.code = ErrorCode::kResourceExhausted,
                        .field = "clients",
                        .value = std::to_string(connections.size() + 1),
                        .allowed = fmt::format("at most {}", options.max_clients)};
  }
  const auto connection = std::make_shared<Connection>(loop->io, std::move(socket), std::move(peer),
                                                       ++last_client, options.frames);
  if (refusal) {
    spdlog::warn("a client was refused: {}", format_error(*refusal));
    return connection->refuse(*refusal);
  }
  spdlog::debug("client {} has connected: process {}", last_client, pid);
  connections[connection->client] = connection;
  connection->start({.on_request = [this](Request& request) { verbs->handle(request); },
                     .on_gone = [this](Connection& gone) { client_gone(gone); }});
}

void Server::State::client_gone(Connection& connection) {
  const uint64_t client = connection.client;
  spdlog::debug("client {} has gone", client);
  connections.erase(client);
  waiters.remove(client);
  weights->client_gone(client);
  bool others_have_slots = false;
  for (const auto& [number, other] : connections) others_have_slots |= other->said_hello;
  delivery.client_gone(client, others_have_slots || connection.peer_is_dead()
                                   ? GoneClient::kKeepMemory
                                   : GoneClient::kReplaceMemory);
  asio::post(loop->io, [this] { waiters.serve(); });  // others may have what it left
}

void Server::State::begin_stop() {
  acceptor.close();
  accept_timer.cancel();
  waiters.refuse_all(
      {.code = ErrorCode::kUnavailable, .field = "server", .message = "is stopping"});
  for (const auto& [number, connection] : connections) {
    connection->finish();
    weights->client_gone(number);
    closing.push_back(connection);
  }
  poll_flush(std::chrono::steady_clock::now() + kFlushTime);
}

// Ends the loop when every reply is out, or the time is up.
void Server::State::poll_flush(std::chrono::steady_clock::time_point deadline) {
  bool is_flushing = false;
  for (const auto& weak : closing) {
    const auto connection = weak.lock();
    is_flushing |= connection && connection->is_open();
  }
  if (!is_flushing || std::chrono::steady_clock::now() >= deadline) return loop->io.stop();
  flush_timer.expires_after(kFlushPoll);
  flush_timer.async_wait([this, deadline](SystemError) { poll_flush(deadline); });
}

void Server::State::stop() {
  if (!is_running.exchange(false)) return;
  asio::post(loop->io, [this] { begin_stop(); });
  thread.join();
  checksums->stop();
  checksums->join();
  listener.reset();
}

Server::Server(ServerOptions options) : state_(std::make_unique<State>(std::move(options))) {}

Server::~Server() {
  stop();
}

void Server::start(RolloutService& service) {
  state_->start(service);
}

void Server::keep_log(DeliveryLog& log, RestoredDelivery restored) {
  state_->options.log = &log;
  state_->options.restored = std::move(restored);
}

void Server::set_metrics_port(int32_t port) {
  state_->metrics_port = port;
}

void Server::stop() {
  state_->stop();
}

void Server::commit(Sample sample) {
  state_->put(std::move(sample));
}

void Server::fail(FailedSample sample) {
  state_->put(std::move(sample));
}

void Server::health_changed() {
  asio::post(state_->loop->io, [state = state_.get()] { state->waiters.serve(); });
}

void Server::ask_numbers(std::function<void(ServerNumbers)> done) {
  asio::post(state_->loop->io, [state = state_.get(), done = std::move(done)] {
    done({.values = state->verbs->numbers(),
          .batch_waits = state->waiters.waits(),
          .fault = state->fault});
  });
}

}  // namespace rollpack::bridge
