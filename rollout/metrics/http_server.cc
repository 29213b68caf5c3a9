#include "rollout/metrics/http_server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "trainer_bridge/wire/asio.h"

#include <fmt/format.h>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>

#include "kernels/base/error.h"
#include "rollout/metrics/bounded_thread.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::rollout {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using boost::system::error_code;
using tcp = asio::ip::tcp;

constexpr int kBacklog = 64;
constexpr uint32_t kMaxHeaderBytes = 8192;
constexpr std::chrono::milliseconds kAcceptRetry{100};
constexpr std::chrono::milliseconds kServerStopTimeout{200};

[[noreturn]] void fail_port(int port, const char* call, int error) {
  throw Error({.code = ErrorCode::kUnavailable,
               .field = "metrics.port",
               .value = std::to_string(port),
               .allowed = "a port of 127.0.0.1 that is free, 0 for any, -1 for none",
               .message = fmt::format("{}: {}", call, std::strerror(error))});
}

// Close-on-exec: ranks that are started in lost ones' place must not keep the port.
bridge::OwnedFd listen_at(int port) {
  bridge::OwnedFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) fail_port(port, "socket", errno);
  const int yes = 1;  // the port of a job that has just ended is free
  ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    fail_port(port, "bind", errno);
  }
  if (::listen(fd.get(), kBacklog) != 0) fail_port(port, "listen", errno);
  return fd;
}

int port_of(int fd) {
  sockaddr_in address{};
  socklen_t bytes = sizeof(address);
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &bytes);
  return ntohs(address.sin_port);
}

}  // namespace

// The server's thread alone touches it, once it runs.
struct HttpServer::State : std::enable_shared_from_this<State> {
  class Connection;

  State(int port, Answer given_answer, HttpLimits given_limits)
      : answer(std::move(given_answer)), limits(given_limits) {
    bridge::OwnedFd fd = listen_at(port);
    bound_port = port_of(fd.get());
    acceptor.assign(fd.release());
  }

  ~State() { is_ending = true; }

  void wait_for_connections();
  void accept_connections();
  void connection_ended();

  const Answer answer;
  const HttpLimits limits;
  int bound_port = 0;
  int num_connections = 0;
  bool is_accepting = false;
  bool is_ending = false;  // connections end with `io`, and need not be followed by others
  asio::io_context io{1};
  asio::posix::stream_descriptor acceptor{io};
  asio::steady_timer accept_timer{io};
};

// Reads one request, writes one reply, closes; all of it within the limit.
class HttpServer::State::Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(State& server, tcp::socket socket)
      : server_(server), stream_(std::move(socket)), buffer_(kMaxHeaderBytes) {
    parser_.header_limit(kMaxHeaderBytes);
    parser_.body_limit(0);
    ++server_.num_connections;
  }
  ~Connection() { server_.connection_ended(); }

  void start() {
    stream_.expires_after(server_.limits.connection);
    http::async_read(
        stream_, buffer_, parser_, [self = shared_from_this()](error_code error, size_t) {
          if (!error) return self->reply();
          if (error.category() != http::make_error_code(http::error::bad_method).category() ||
              error == http::error::end_of_stream) {
            return;  // it went, or time is up
          }
          self->write({.status = 400, .body = "not a request this server reads\n"});
        });
  }

 private:
  void reply() {
    const auto& request = parser_.get();
    is_head_ = request.method() == http::verb::head;
    if (!is_head_ && request.method() != http::verb::get) {
      return write({.status = 405, .body = "GET and HEAD only\n"});
    }
    const std::string_view target(request.target().data(), request.target().size());
    try {
      write(server_.answer(target.substr(0, target.find('?'))));
    } catch (const std::exception& error) {
      write({.status = 500, .body = fmt::format("{}\n", error.what())});
    }
  }

  void write(HttpReply reply) {
    response_.version(11);
    response_.result(static_cast<unsigned>(reply.status));
    response_.set(http::field::content_type, reply.content_type);
    response_.set(http::field::cache_control, "no-store");
    if (reply.status == 405) response_.set(http::field::allow, "GET, HEAD");
    response_.keep_alive(false);
    response_.body() = std::move(reply.body);
    response_.prepare_payload();
    if (is_head_) response_.body().clear();  // its length stays in the header
    http::async_write(stream_, serializer_, [self = shared_from_this()](error_code error, size_t) {
      if (!error) self->stream_.socket().shutdown(tcp::socket::shutdown_send, error);
    });
  }

  State& server_;
  beast::tcp_stream stream_;
  beast::flat_buffer buffer_;
  http::request_parser<http::empty_body> parser_;
  http::response<http::string_body> response_;
  http::response_serializer<http::string_body> serializer_{response_};
  bool is_head_ = false;
};

void HttpServer::State::wait_for_connections() {
  if (is_accepting || num_connections >= limits.max_connections) return;
  is_accepting = true;
  acceptor.async_wait(asio::posix::stream_descriptor::wait_read, [this](error_code error) {
    is_accepting = false;
    if (!error) accept_connections();
  });
}

void HttpServer::State::accept_connections() {
  while (num_connections < limits.max_connections) {
    bridge::OwnedFd fd(
        ::accept4(acceptor.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (fd) {
      tcp::socket socket(io);
      socket.assign(tcp::v4(), fd.release());
      std::make_shared<Connection>(*this, std::move(socket))->start();
      continue;
    }
    if (errno == EINTR || errno == ECONNABORTED) continue;
    if (errno == EAGAIN || errno == EWOULDBLOCK) break;
    // Out of descriptors or memory: the peer stays in the backlog until some are free again.
    accept_timer.expires_after(kAcceptRetry);
    return accept_timer.async_wait([this](error_code error) {
      if (!error) wait_for_connections();
    });
  }
  wait_for_connections();
}

void HttpServer::State::connection_ended() {
  --num_connections;
  if (!is_ending) wait_for_connections();
}

HttpServer::HttpServer(int port, Answer answer, HttpLimits limits)
    : state_(std::make_shared<State>(port, std::move(answer), limits)) {}

HttpServer::~HttpServer() {
  state_->io.stop();
  if (thread_) thread_->join(kServerStopTimeout);
}

void HttpServer::start() {
  thread_ = std::make_unique<BoundedThread>([state = state_] {
    const auto guard = asio::make_work_guard(state->io);
    state->wait_for_connections();
    while (!state->io.stopped()) {
      try {
        state->io.run();
      } catch (const std::exception&) {
        // Of one connection, which ends with it.
      }
    }
  });
}

int HttpServer::port() const {
  return state_->bound_port;
}

}  // namespace rollpack::rollout
