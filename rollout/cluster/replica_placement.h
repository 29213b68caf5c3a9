// Which ranks hold one model together: tensor_model_parallel_size of them that follow each other,
// on one host. The lowest leads; the rest of the cluster sees leaders only, numbered by replica.
#pragma once

#include "kernels/shards.h"
#include "rollout/cluster/launch.h"

namespace rollpack::rollout {

struct ReplicaPlacement {
  // The replicas' leaders as if they were all ranks there are: rank is this one's replica. CPUs are
  // still shared with every rank of the host.
  Placement leaders;
  kernels::ReplicaRank at;  // this rank in its replica

  bool is_leader() const { return at.rank == 0; }
};

// Errors: invalid_argument where `size` does not divide the number of ranks; unsupported where a
// replica's ranks are on several hosts.
ReplicaPlacement place_replicas(const Placement& ranks, int size);

}  // namespace rollpack::rollout
