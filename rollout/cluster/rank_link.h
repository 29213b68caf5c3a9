// Links between rank 0 and the workers of other ranks: a Unix socket each, frames of message_codec.
// Rank 0 serves all of them from one thread. A link that ends while its worker should live is how a
// death is noticed.
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

  // Takes the connections of ranks 1 to num_ranks - 1 and makes each a worker of `dispatcher`, in
  // rank order, then serves them. The socket file is removed. Errors: deadline_exceeded naming the
  // ranks.
  void connect(Dispatcher& dispatcher, int num_ranks,
               std::chrono::steady_clock::time_point deadline);

 private:
  class Link;

  const std::string path_;
  int listener_ = -1;
  bridge::asio::io_context io_;
  std::vector<std::shared_ptr<Link>> links_;
  std::thread thread_;
};

// A worker rank's end: connects and says which rank it is; then the caller reads and writes.
// Errors: deadline_exceeded when rank 0 does not listen in time.
class RankClient {
 public:
  RankClient(const std::string& path, int rank, std::chrono::steady_clock::time_point deadline);
  ~RankClient();

  void send(const Event& event);  // thread-safe; waits while the socket is full
  // The next command; nullopt when rank 0 is gone.
  std::optional<Command> receive();

 private:
  int socket_ = -1;
  std::mutex send_mutex_;
};

}  // namespace rollpack::rollout
