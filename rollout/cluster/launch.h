// How this process was started: alone, or as one rank of an mpirun. MPI is used here and nowhere
// else, and only while ranks meet: to learn who they are and where rank 0's socket is. Then it is
// left, so that no death can block it and no crash leaves its files behind; ranks go on by socket.
//
// `mpirun --enable-recovery` lets a job live on when a rank dies, and then returns 0 whatever
// became of it. So rank 0 also writes its exit status to the file that ROLLPACK_STATUS_FILE names,
// if it names one: "running" from the start, the number at the end.
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/usable_cores.h"
#include "rollout/cluster/replacement.h"

namespace rollpack::rollout {

struct Placement {
  int rank = 0;
  int num_ranks = 1;
  int num_ranks_on_node = 1;
  int rank_on_node = 0;  // which of them it is, or takes the place of: whose device it computes on
  // The node of each rank, numbered by their first ranks: rank 0 is on node 0.
  std::vector<int> node_of_rank = {0};
  kernels::CpuSharing cpus;  // with how many ranks this one shares its CPUs

  int node() const { return node_of_rank[static_cast<size_t>(rank)]; }
  bool is_on_first_node() const { return node() == 0; }
  // The lowest rank of each node.
  std::vector<int> first_ranks() const;
  bool has_other_nodes() const { return num_nodes() > 1; }
  int num_nodes() const;
  int most_ranks_on_a_node() const;
};

class MeetingLimit;

class Launch {
 public:
  // Under mpirun: ties this process's life to its parent's, then MPI_Init. Without mpirun's
  // environment MPI is never called; a worker that rank 0 has started (replacement.h) is told by it
  // who it is.
  Launch(int* argc, char*** argv);
  ~Launch();

  const Placement& placement() const { return placement_; }
  const std::optional<JoinOrder>& join_order() const { return join_order_; }
  // Whether the launcher lets the others go on when a rank dies.
  bool survives_deaths() const;

  // `text` of rank 0, on every rank; then all call `connect` with it, and leave MPI. Every rank
  // calls it once. Errors: what `connect` throws; on rank 0 also what it threw elsewhere.
  std::string meet(const std::string& text,
                   const std::function<void(const std::string&)>& connect = {});
  // Rank 0, while it connects in meet(): some rank could not.
  bool has_heard_of_failure() const;
  // Rank 0 cannot go on: others that wait in meet() get an empty text. Does nothing after meet().
  void call_off();

  // A host can no longer be reached. Any thread. mpirun, if it goes on without it, then waits for
  // its word for ever, so rank 0 ends mpirun when it exits.
  void note_lost_host() { has_lost_host_ = true; }

  // Leaves the process: flushed, no destructors. mpirun ends the job when `status` is not 0, unless
  // told to go on.
  [[noreturn]] void exit(int status) const;

 private:
  Placement placement_;
  std::optional<JoinOrder> join_order_;
  bool has_mpi_ = false;
  std::atomic<bool> has_lost_host_ = false;
  std::filesystem::path mpi_folder_;
  std::unique_ptr<MeetingLimit> limit_;  // while ranks meet
};

}  // namespace rollpack::rollout
