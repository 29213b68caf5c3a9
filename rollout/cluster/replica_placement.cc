#include "rollout/cluster/replica_placement.h"

#include <algorithm>
#include <functional>
#include <map>
#include <string>

#include <fmt/format.h>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

constexpr const char* kField = "engine.tensor_model_parallel_size";

}  // namespace

ReplicaPlacement place_replicas(const Placement& ranks, int size) {
  if (size == 1) return {.leaders = ranks, .at = {}};
  if (ranks.num_ranks % size != 0) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = kField,
                 .value = std::to_string(size),
                 .allowed = fmt::format("a divisor of the number of ranks, {}", ranks.num_ranks),
                 .message = "a replica is that many ranks; start some multiple with mpirun -n"});
  }
  ReplicaPlacement placement{.leaders = ranks, .at = {.rank = ranks.rank % size, .size = size}};
  Placement& leaders = placement.leaders;
  leaders.rank = ranks.rank / size;
  leaders.num_ranks = ranks.num_ranks / size;
  leaders.node_of_rank.clear();
  std::map<int, int> nodes;  // those of the ranks, numbered by their first leaders
  for (int first = 0; first < ranks.num_ranks; first += size) {
    const auto begin = ranks.node_of_rank.begin() + first;
    if (std::adjacent_find(begin, begin + size, std::not_equal_to<>()) != begin + size) {
      throw Error({.code = ErrorCode::kUnsupported,
                   .field = kField,
                   .value = std::to_string(size),
                   .allowed = "replicas whose ranks are on one host",
                   .message = fmt::format("ranks {} to {} are not; give every host a multiple of "
                                          "{} ranks (mpirun --map-by ppr:N:node)",
                                          first, first + size - 1, size)});
    }
    leaders.node_of_rank.push_back(
        nodes.emplace(*begin, static_cast<int>(nodes.size())).first->second);
  }
  const int own_node = leaders.node_of_rank[static_cast<size_t>(leaders.rank)];
  leaders.num_ranks_on_node = static_cast<int>(std::ranges::count(leaders.node_of_rank, own_node));
  return placement;
}

}  // namespace rollpack::rollout
