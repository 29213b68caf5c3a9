#include "trainer_bridge/server/connection.h"

#include <fmt/format.h>

#include <exception>
#include <utility>

#include "trainer_bridge/wire/message.h"

namespace rollpack::bridge {
namespace {

// Requests of one client without an answer; far above what a trainer keeps in flight.
constexpr int64_t kMaxOpenRequests = 256;

Json error_reply(uint64_t id, const ErrorInfo& info) {
  return {{"id", id}, {"ok", false}, {"error", error_to_map(info)}};
}

}  // namespace

void Responder::ok(Json fields, std::vector<OwnedFd> fds) const {
  fields["ok"] = true;
  if (const auto connection = connection_.lock()) {
    connection->reply(id_, std::move(fields), std::move(fds));
  }
}

void Responder::error(const ErrorInfo& info) const {
  if (const auto connection = connection_.lock())
    connection->reply(id_, error_reply(id_, info), {});
}

void Responder::outcome(const std::optional<ErrorInfo>& outcome) const {
  outcome ? error(*outcome) : ok();
}

Connection::Connection(asio::io_context& io, OwnedFd socket, Peer peer, uint64_t client_number,
                       FrameSocketOptions options)
    : client(client_number),
      peer_pid(peer.pid),
      socket_(std::make_shared<FrameSocket>(io, std::move(socket), options)),
      peer_life_(io) {
  if (peer.pidfd) peer_life_.assign(peer.pidfd.release());
}

void Connection::start(Callbacks callbacks) {
  callbacks_ = std::move(callbacks);
  const std::weak_ptr<Connection> weak = weak_from_this();
  socket_->start(
      [weak](Frame frame) {
        if (const auto self = weak.lock()) self->handle(std::move(frame));
      },
      [weak](std::optional<ErrorInfo> error) {
        const auto self = weak.lock();
        if (!self) return;
        error ? self->fail(*error) : self->gone();
      });
  watch_peer();
}

void Connection::watch_peer() {
  if (!peer_life_.is_open()) return;
  peer_life_.async_wait(asio::posix::stream_descriptor::wait_read,
                        [weak = weak_from_this()](SystemError error) {
                          const auto self = weak.lock();
                          if (error || !self) return;
                          self->socket_->drain();  // what it sent before it died still counts
                          self->gone();
                        });
}

void Connection::handle(Frame frame) {
  if (is_gone_) return;
  try {
    dispatch(decode_message(frame.body), std::move(frame.fds));
  } catch (const Error& error) {
    fail(error.info);
  }
}

void Connection::dispatch(const Json& map, std::vector<OwnedFd> fds) {
  Fields fields(map, "", "request");
  const uint64_t id = fields.u64("id");
  ErrorInfo refusal;
  try {
    const std::string verb = fields.text("verb");
    const int64_t num_fds = fields.optional_integer("num_fds", 0, kMaxFdsPerFrame).value_or(0);
    if (num_fds != static_cast<int64_t>(fds.size())) {
      fields.refuse("num_fds", num_fds,
                    fmt::format("{}, the file descriptors that came with the frame", fds.size()));
    }
    const Responder responder(weak_from_this(), id);
    ++num_open_requests_;
    Request request{verb, fields, fds, *this, responder};
    try {
      if (num_open_requests_ > kMaxOpenRequests) {
        throw Error({.code = ErrorCode::kWouldBlock,
                     .field = "requests",
                     .value = std::to_string(num_open_requests_),
                     .allowed = fmt::format("at most {} without an answer", kMaxOpenRequests)});
      }
      callbacks_.on_request(request);
    } catch (const Error& error) {
      responder.error(error.info);
    } catch (const std::bad_alloc&) {
      responder.error({.code = ErrorCode::kResourceExhausted,
                       .field = verb,
                       .message = "not enough memory for this request"});
    } catch (const std::exception& error) {
      responder.error({.code = ErrorCode::kInternal, .field = verb, .message = error.what()});
    }
  } catch (const Error& error) {
    fail(error.info, id);
  }
}

void Connection::reply(uint64_t id, Json fields, std::vector<OwnedFd> fds) {
  --num_open_requests_;
  if (is_gone_) return;
  fields["id"] = id;
  std::vector<uint8_t> body;
  try {
    body = encode_message(fields);
  } catch (const Error& error) {
    fds.clear();
    body = encode_message(error_reply(id, error.info));
  }
  socket_->send(std::move(body), std::move(fds));
}

void Connection::fail(const ErrorInfo& error, uint64_t id) {
  if (is_gone_) return;
  socket_->send(encode_message(error_reply(id, error)));
  gone();
}

void Connection::gone() {
  if (std::exchange(is_gone_, true)) return;
  const auto self = shared_from_this();  // on_gone lets go of this object
  peer_is_dead_ = peer_life_.is_open() && has_ended(peer_life_.native_handle());
  finish();
  callbacks_.on_gone(*this);
}

void Connection::refuse(const ErrorInfo& error) {
  is_gone_ = true;
  socket_->send(encode_message(error_reply(0, error)));
  finish();
}

void Connection::finish() {
  is_gone_ = true;
  SystemError ignored;
  peer_life_.close(ignored);
  socket_->finish();
}

}  // namespace rollpack::bridge
