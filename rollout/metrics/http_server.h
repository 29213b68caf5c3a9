// A small HTTP server on 127.0.0.1: GET and HEAD, one answer a connection. It has one thread, a
// bound on connections and on the time of each, so that no peer, slow, silent or hostile, can
// take more than that of it.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace rollpack::rollout {

struct HttpReply {
  int status = 200;
  std::string content_type = "text/plain; charset=utf-8";
  std::string body;
};

struct HttpLimits {
  int max_connections = 16;  // others wait to be accepted
  std::chrono::milliseconds connection{5000};
};

class HttpServer {
 public:
  // Answers a request's path, without its query. Called on the server's thread: must not block.
  using Answer = std::function<HttpReply(std::string_view path)>;

  // Listens at `port`, 0 for any free one. Connections are answered from start() on.
  // Errors: unavailable naming metrics.port when it cannot be had.
  HttpServer(int port, Answer answer, HttpLimits limits = {});
  // Stops; waits at most 200 ms for the thread.
  ~HttpServer();

  void start();
  int port() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
  std::unique_ptr<class BoundedThread> thread_;
};

}  // namespace rollpack::rollout
