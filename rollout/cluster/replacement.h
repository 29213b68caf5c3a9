// Workers beside those that mpirun started: this program once more, with the same command line, as
// a child that inherits its link to rank 0 and never calls MPI. The environment variable
// ROLLPACK_JOIN tells it so.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>

#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::rollout {

// What a child is told.
struct JoinOrder {
  int rank = 0;          // its number, after those of mpirun's ranks
  int rank_on_node = 0;  // of the one that it replaces
  int num_ranks = 1;     // of the node, as it was started: they share the machine's CPUs
  int socket = -1;       // inherited
  pid_t parent = 0;
  std::string line;  // what ranks are told when they meet; see Launch::meet
};

// This process's order, where it is such a child.
std::optional<JoinOrder> join_order();

struct Child {
  pid_t pid = 0;
  bridge::OwnedFd process;  // pidfd
  bridge::OwnedFd socket;   // our end
};

// Starts one. It dies with the calling thread (PR_SET_PDEATHSIG), so that thread must live as long
// as the job. Errors: unavailable or resource_exhausted naming the call that failed.
Child start_child(int rank, int rank_on_node, int num_ranks, const std::string& line);

}  // namespace rollpack::rollout
