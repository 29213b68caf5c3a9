// Where a node's bridge takes samples from other ranks: those of its node connect to a Unix socket
// of abstract name, so that no crash leaves a file; those of other nodes by TCP
// (cluster/handshake), and get receipts. Frames are those of sample_frame.h.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "rollout/node_bridge/kept_store.h"
#include "trainer_bridge/wire/asio.h"
#include "trainer_bridge/wire/frame_socket.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::rollout {

class SampleInlet {
 public:
  // `job` and `rank`, of the bridge, make up the name. `store` outlives this.
  // Errors: unavailable where the socket cannot be made.
  SampleInlet(const std::string& job, int rank, KeptStore& store);
  ~SampleInlet();

  // A rank of another node has connected and is known. Closed at once where there are
  // kMaxRemoteLinks already. Any thread.
  void admit(int32_t worker, bridge::OwnedFd socket);

  // More ranks of other nodes than that go through rank 0 until some have gone: a descriptor and
  // some KiB each.
  static constexpr int kMaxRemoteLinks = 256;

 private:
  struct Link;

  void wait();
  void admit_next();
  void serve(std::shared_ptr<Link> link, bridge::OwnedFd socket);
  void take(Link& link, std::vector<uint8_t> body);

  KeptStore& store_;
  int num_remote_links_ = 0;  // the thread's
  bridge::asio::io_context io_{1};
  bridge::asio::posix::stream_descriptor listener_{io_};
  std::thread thread_;
};

// The other end: a rank's way to the bridge of its node.
class SampleOutlet {
 public:
  // Connects with the first sample: the bridge listens before anyone can ask for one.
  SampleOutlet(std::string job, int bridge_rank, std::chrono::milliseconds limit)
      : job_(std::move(job)), bridge_rank_(bridge_rank), limit_(limit) {}

  // Whether the bridge has it, or will whatever becomes of this process. False from the first time
  // on that it could not be handed over within the limit: samples go through rank 0 then.
  bool put(const std::vector<uint8_t>& frame);

 private:
  const std::string job_;
  const int bridge_rank_;
  const std::chrono::milliseconds limit_;
  std::mutex mutex_;
  bridge::OwnedFd socket_;
  bool is_broken_ = false;
};

}  // namespace rollpack::rollout
