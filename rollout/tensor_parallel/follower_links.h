// The leader's end of the sockets to the other ranks of its replica: requests out, answers in, and
// who has gone.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "kernels/shards.h"
#include "rollout/tensor_parallel/replica_socket.h"
#include "trainer_bridge/wire/deadline.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::rollout {

// What a follower says when it has built its backend.
struct FollowerReady {
  int32_t num_pages = 0;
  std::string fingerprint;
  // Of each weight, in the order of declaration: rows of its parts that the rank holds; empty where
  // it holds all.
  std::vector<std::vector<kernels::ShardRange>> shards;

  std::vector<uint8_t> encode() const;
  static FollowerReady decode(std::span<const uint8_t> bytes);
};

class FollowerLinks {
 public:
  explicit FollowerLinks(std::vector<bridge::OwnedFd> followers);

  int32_t size() const { return static_cast<int32_t>(sockets_.size()); }  // the leader counted
  // Hands every follower the memory that collectives go through, and the bytes by which devices
  // reach each other. Errors: deadline_exceeded, unavailable.
  void welcome(const ReplicaMemory& memory, std::span<const std::byte> device_link,
               bridge::Deadline deadline);
  // What rank r > 0 says once it is ready. Errors: those it reports; unavailable where it has gone.
  FollowerReady wait_ready(int32_t rank, bridge::Deadline deadline);

  // To one follower, or to all. Any thread. Errors: unavailable naming the rank that has gone;
  // deadline_exceeded.
  void send(int32_t rank, Request request, std::span<const uint8_t> body,
            bridge::Deadline deadline);
  void send_all(Request request, std::span<const uint8_t> body, bridge::Deadline deadline);
  // The next answer of rank r. Errors: the one it reports; unavailable; deadline_exceeded.
  uint64_t receive(int32_t rank, bridge::Deadline deadline);

  // A follower whose process or socket has ended, or -1. Any thread.
  int32_t find_lost_rank() const;
  // Ends all followers: this replica does no more steps. Any thread.
  void give_up();

 private:
  const std::vector<bridge::OwnedFd> sockets_;  // by rank; none at 0
  std::vector<bridge::OwnedFd> processes_;      // pidfds, likewise
  std::mutex send_mutex_;
};

}  // namespace rollpack::rollout
