// One client: its socket, its process, its open requests. Checks what every request must have and
// hands it on; knows no verb.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "trainer_bridge/wire/asio.h"
#include "trainer_bridge/wire/fields.h"
#include "trainer_bridge/wire/frame_socket.h"
#include "trainer_bridge/wire/peer.h"

namespace rollpack::bridge {

class Connection;

// Answers one request. On the server's thread; does nothing once the client is gone.
class Responder {
 public:
  Responder(std::weak_ptr<Connection> connection, uint64_t id)
      : connection_(std::move(connection)), id_(id) {}

  void ok(Json fields = Json::object(), std::vector<OwnedFd> fds = {}) const;
  void error(const ErrorInfo& info) const;
  // ok({}) or error().
  void outcome(const std::optional<ErrorInfo>& outcome) const;

 private:
  std::weak_ptr<Connection> connection_;
  uint64_t id_;
};

struct Request {
  std::string verb;
  Fields& fields;  // verb, id and num_fds are read already
  std::vector<OwnedFd>& fds;
  Connection& connection;
  Responder responder;
};

// Single-threaded: the server's thread.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  struct Callbacks {
    std::function<void(Request&)> on_request;  // may throw Error: the reply to that request
    std::function<void(Connection&)> on_gone;  // once; no request follows
  };

  Connection(asio::io_context& io, OwnedFd socket, Peer peer, uint64_t client,
             FrameSocketOptions options);

  void start(Callbacks callbacks);
  // Tells the client why, then closes; no callback follows.
  void refuse(const ErrorInfo& error);
  // Writes what is queued, then closes; no callback follows.
  void finish();
  bool is_open() const { return socket_->is_open(); }
  // Whether its process had ended when it went; false where the kernel cannot say.
  bool peer_is_dead() const { return peer_is_dead_; }

  // A number no other connection of this server has or had.
  const uint64_t client;
  const pid_t peer_pid;  // 0 across pid namespaces
  bool said_hello = false;

 private:
  friend class Responder;

  void handle(Frame frame);
  // The request's id and verb, or an Error that costs the connection.
  void dispatch(const Json& map, std::vector<OwnedFd> fds);
  void reply(uint64_t id, Json fields, std::vector<OwnedFd> fds);
  void watch_peer();
  // Says `error` under `id` where there is one, then ends the connection.
  void fail(const ErrorInfo& error, uint64_t id = 0);
  void gone();

  std::shared_ptr<FrameSocket> socket_;
  asio::posix::stream_descriptor peer_life_;  // of the process's pidfd, where there is one
  Callbacks callbacks_;
  int64_t num_open_requests_ = 0;
  bool is_gone_ = false;
  bool peer_is_dead_ = false;
};

}  // namespace rollpack::bridge
