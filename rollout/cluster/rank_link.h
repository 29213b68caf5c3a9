// Links between rank 0 and the workers of other ranks: a Unix socket each, frames of message_codec.
// Rank 0 serves all of them from one thread. A death is noticed by the end of the socket or of the
// process (pidfd), whichever comes first; a process that only stands still, by the dispatcher's
// leases, which are checked here.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "rollout/cluster/dispatcher.h"
#include "trainer_bridge/wire/frame_socket.h"

namespace rollpack::rollout {

// Rank 0's end of all links.
class RankHub {
 public:
  // Listens at `path` (in a folder only this user may enter).
  explicit RankHub(const std::string& path);
  ~RankHub();

  struct ConnectOptions {
    int num_ranks = 1;
    std::chrono::steady_clock::time_point deadline;
    bool may_miss = false;  // ranks that do not come in time are lost; otherwise that is an error
    std::chrono::milliseconds lease{30000};
  };
  // Takes the connections of ranks 1 to num_ranks - 1 and makes each a worker of `dispatcher`, in
  // rank order, then serves them. The socket file is removed. Errors: deadline_exceeded naming the
  // ranks.
  void connect(Dispatcher& dispatcher, const ConnectOptions& options);

  // Starts one more worker process, which joins `dispatcher`; any thread, after connect(). `line`
  // is what ranks are told when they meet.
  void start_replacement(Dispatcher& dispatcher, const std::string& line);

 private:
  class Link;
  class NoLink;

  void accept_ranks(const ConnectOptions& options);
  void watch_leases(Dispatcher& dispatcher, std::chrono::milliseconds period);

  const std::string path_;
  int listener_ = -1;
  bridge::asio::io_context io_;
  bridge::asio::steady_timer lease_timer_{io_};
  int num_ranks_ = 1;
  std::vector<std::shared_ptr<Link>> links_;
  std::thread thread_;
};

// A worker rank's end: connects and says which rank it is; then the caller reads and writes.
// Errors: deadline_exceeded when rank 0 does not listen in time.
class RankClient {
 public:
  RankClient(const std::string& path, int rank, std::chrono::steady_clock::time_point deadline);
  // Over a socket that rank 0 has made for this process.
  explicit RankClient(bridge::OwnedFd socket) : socket_(socket.release()) {}
  ~RankClient();

  void send(const Event& event);  // thread-safe; waits while the socket is full
  // The next command; nullopt when rank 0 is gone.
  std::optional<Command> receive();

 private:
  int socket_ = -1;
  std::mutex send_mutex_;
};

}  // namespace rollpack::rollout
