// Memory that came to one rank of a node is given to the node's others by a Unix socket. Its name
// is abstract, so no crash leaves a file; only this user's processes are served.
#pragma once

#include <string>
#include <thread>

#include "rollout/cluster/memory_frames.h"
#include "rollout/cluster/received_memory.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::rollout {

class NodeMemory {
 public:
  // `job` is a random text that the ranks of a job have in common.
  // Errors: unavailable where the socket cannot be made.
  NodeMemory(std::string job, int rank);
  ~NodeMemory();

  // What came to this rank.
  ReceivedMemory& received() { return received_; }
  // Memory that `use.holder` has, this rank or another. Errors: unavailable where it has not.
  bridge::OwnedFd find(const MemoryUse& use) const;

 private:
  void serve();
  bridge::OwnedFd fetch(const MemoryUse& use) const;

  const std::string job_;
  const int rank_;
  bridge::OwnedFd listener_;
  bridge::OwnedFd end_;  // an eventfd: the thread ends
  ReceivedMemory received_;
  std::thread thread_;
};

}  // namespace rollpack::rollout
