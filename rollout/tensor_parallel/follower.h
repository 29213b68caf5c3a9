// A rank that holds a part of a model and runs the steps that its leader plans.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <vector>

#include "kernels/communicator/communicator.h"
#include "rollout/engine/replica.h"
#include "rollout/tensor_parallel/replica_socket.h"

namespace rollpack::rollout {

// Builds this rank's replica, tells the leader, and does what it says until its socket ends.
// `communicator` is of the replica's ranks. Errors: those of a step, or of a broken connection;
// what keeps it from getting ready is told to the leader as well.
void follow(bridge::OwnedFd leader, const Config& config, const ModelConfig& model,
            const ReplicaOptions& options);

// What the leader welcomes its followers with.
struct Welcome {
  std::shared_ptr<kernels::Communicator> communicator;
  std::vector<std::byte> device_link;
};

// Errors: deadline_exceeded, unavailable.
Welcome join_replica(int leader, kernels::ReplicaRank at, std::chrono::milliseconds timeout,
                     bridge::Deadline deadline);

}  // namespace rollpack::rollout
