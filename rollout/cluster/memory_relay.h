// Memory passed from node to node: a rank that has it, or is getting it, sends it on to a rank of
// the next one, so that rank 0 sends it once however many nodes there are. Each rank of a node
// other than rank 0's listens for that at the address by which it reached rank 0, and answers to
// rank 0. Who brings samples for the bridge of this node (../node_bridge) connects there too.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <mutex>
#include <string>
#include <thread>

#include "rollout/cluster/memory_frames.h"
#include "rollout/cluster/received_memory.h"
#include "rollout/cluster/tcp_socket.h"
#include "trainer_bridge/wire/frame.h"

namespace rollpack::rollout {

class MemoryRelay {
 public:
  struct Options {
    std::string token;                        // of the job: who sends shows it
    std::string reply;                        // likewise: who brings samples is shown it
    std::chrono::milliseconds limit{30000};   // for a piece to come or go
    std::function<void(MemoryState)> answer;  // to rank 0; from the relay's thread
  };
  MemoryRelay(ReceivedMemory& memory, TcpListener listener, Options options);
  ~MemoryRelay();

  // Sends a memory on, from what has come of it to its end. Where that fails nobody is told: rank 0
  // sees that nothing comes, and sends it itself.
  void forward(const MemoryForward& order);

  // Connections of ranks that bring samples, on the relay's thread; without it they are closed.
  using TakeSamples = std::function<void(int32_t rank, bridge::OwnedFd socket)>;
  void set_take_samples(TakeSamples take);

 private:
  struct Sender {
    bridge::OwnedFd socket;
    uint64_t number = 0;  // as a source
    bool is_known = false;
    bridge::FrameReader reader;
  };

  void receive();
  void drop_oldest_stranger();
  bool hear(Sender& sender);  // false: its connection is of no more use here
  void hand_over(Sender& sender, int32_t rank);
  void send();
  bool is_ending();
  void send_on(const MemoryForward& order);

  ReceivedMemory& memory_;
  const TcpListener listener_;
  const Options options_;
  bridge::OwnedFd end_;  // an eventfd: the threads end
  std::list<Sender> senders_;
  uint64_t num_senders_ = 0;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<MemoryForward> orders_;
  bool is_ending_ = false;
  TakeSamples take_samples_;
  std::map<int32_t, bridge::OwnedFd> targets_;  // connections by rank
  std::thread receiving_, sending_;
};

}  // namespace rollpack::rollout
