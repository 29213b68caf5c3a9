// A worker rank's side of memory that rank 0 sends to a node other than its own: the rank that
// receives it writes it into a memfd, and gives that to the other ranks of the node by a Unix
// socket. Its name is abstract, so no crash leaves a file; only this user's processes are served.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "rollout/cluster/memory_frames.h"
#include "trainer_bridge/shared_memory/segment.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::rollout {

class NodeMemory {
 public:
  // `job` is a random text that the ranks of a job have in common.
  // Errors: unavailable where the socket cannot be made.
  NodeMemory(std::string job, int rank);
  ~NodeMemory();

  // Keeps a piece; what to tell rank 0. Sealed and given away once the last one has come.
  MemoryState write(const MemoryPiece& piece);
  void drop(uint64_t memory);
  // Memory that `use.holder` has, this rank or another. Errors: unavailable where it has not.
  bridge::OwnedFd find(const MemoryUse& use) const;

 private:
  struct Held {
    bridge::OpenSegment segment;
    int64_t num_bytes = 0;  // that have come
  };

  void serve();
  std::optional<bridge::OwnedFd> copy_of(uint64_t memory) const;
  bridge::OwnedFd fetch(const MemoryUse& use) const;

  const std::string job_;
  const int rank_;
  bridge::OwnedFd listener_;
  bridge::OwnedFd end_;  // an eventfd: the thread ends
  mutable std::mutex mutex_;
  std::map<uint64_t, Held> held_;
  std::thread thread_;
};

}  // namespace rollpack::rollout
