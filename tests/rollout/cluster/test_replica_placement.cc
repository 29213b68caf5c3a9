// Which ranks hold a model together, and what the cluster sees of them.
#include "rollout/cluster/replica_placement.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

Placement ranks_on(std::vector<int> node_of_rank, int rank) {
  return {.rank = rank,
          .num_ranks = static_cast<int>(node_of_rank.size()),
          .num_ranks_on_node = 4,
          .rank_on_node = rank % 4,
          .node_of_rank = std::move(node_of_rank),
          .cpus = {.num_processes = 4, .index = rank % 4}};
}

std::string refusal(const Placement& ranks, int size) {
  try {
    place_replicas(ranks, size);
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

TEST(ReplicaPlacement, NumbersLeadersByReplica) {
  const Placement ranks = ranks_on({0, 0, 0, 0, 1, 1, 1, 1}, 6);
  const ReplicaPlacement place = place_replicas(ranks, 2);
  EXPECT_TRUE(place.is_leader());
  EXPECT_EQ(place.at.size, 2);
  EXPECT_EQ(place.leaders.rank, 3);
  EXPECT_EQ(place.leaders.num_ranks, 4);
  EXPECT_EQ(place.leaders.num_ranks_on_node, 2);
  EXPECT_EQ(place.leaders.node_of_rank, (std::vector<int>{0, 0, 1, 1}));
  EXPECT_EQ(place.leaders.cpus.num_processes, 4);  // every rank computes
  EXPECT_EQ(place.leaders.rank_on_node, 2);        // on the device of its number
  const ReplicaPlacement follower = place_replicas(ranks_on({0, 0, 0, 0, 1, 1, 1, 1}, 7), 2);
  EXPECT_FALSE(follower.is_leader());
  EXPECT_EQ(follower.at.rank, 1);
  EXPECT_EQ(follower.leaders.rank, 3);
}

TEST(ReplicaPlacement, LeavesLoneRanksAsTheyAre) {
  const ReplicaPlacement place = place_replicas(ranks_on({0, 1, 0}, 1), 1);
  EXPECT_TRUE(place.is_leader());
  EXPECT_EQ(place.leaders.rank, 1);
  EXPECT_EQ(place.leaders.node_of_rank, (std::vector<int>{0, 1, 0}));
}

TEST(ReplicaPlacement, RefusesSizesThatDoNotDivideTheRanks) {
  EXPECT_EQ(
      refusal(ranks_on({0, 0, 0, 0}, 0), 3),
      "engine.tensor_model_parallel_size = 3: expected a divisor of the number of ranks, 4; a "
      "replica is that many ranks; start some multiple with mpirun -n");
  EXPECT_NE(refusal(ranks_on({0}, 0), 2), "");
}

TEST(ReplicaPlacement, RefusesReplicasOnTwoHosts) {
  EXPECT_EQ(refusal(ranks_on({0, 0, 0, 1, 1, 1}, 0), 2),
            "engine.tensor_model_parallel_size = 2: expected replicas whose ranks are on one host; "
            "ranks 2 to 3 are not; give every host a multiple of 2 ranks (mpirun --map-by "
            "ppr:N:node)");
  EXPECT_EQ(refusal(ranks_on({0, 0, 0, 1, 1, 1}, 0), 3), "");
}

}  // namespace
}  // namespace rollpack::rollout
