// The leader's side of a replica: its links to the other ranks, the memory between them, its
// backend.
#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "rollout/engine/replica.h"
#include "rollout/tensor_parallel/follower_links.h"
#include "rollout/tensor_parallel/leader_backend.h"

namespace rollpack::rollout {

class LeadingRank {
 public:
  // `followers` have connected. `timeout` is that of one exchange in a step. `device_link`:
  // kernels/registry.h. Errors: deadline_exceeded, unavailable.
  LeadingRank(std::vector<bridge::OwnedFd> followers, std::chrono::milliseconds timeout,
              bridge::Deadline deadline, std::vector<std::byte> device_link = {});

  // Waits until the followers have built theirs. Errors: those of LeaderBackend.
  std::unique_ptr<Replica> make_replica(const Config& config, const ModelConfig& model,
                                        ReplicaOptions options, bridge::Deadline deadline);
  // Each rank stages its share of the files; the caller commits.
  void load_checkpoints(Replica& replica) { backend_->load_checkpoints(replica); }

 private:
  std::shared_ptr<FollowerLinks> followers_;
  std::shared_ptr<kernels::Communicator> communicator_;
  std::vector<std::byte> device_link_;
  LeaderBackend* backend_ = nullptr;  // of the replica made
};

}  // namespace rollpack::rollout
