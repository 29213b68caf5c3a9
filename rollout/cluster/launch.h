// How this process was started: alone, or as one rank of an mpirun. MPI is used here and nowhere
// else, and only while ranks meet: to learn who they are and where rank 0's socket is. Then it is
// left, so that no death can block it and no crash leaves its files behind; ranks go on by socket.
//
// `mpirun --enable-recovery` lets a job live on when a rank dies, and then returns 0 whatever
// became of it. So rank 0 also writes its exit status to the file that ROLLPACK_STATUS_FILE names,
// if it names one: "running" from the start, the number at the end.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "kernels/usable_cores.h"
#include "rollout/cluster/replacement.h"

namespace rollpack::rollout {

struct Placement {
  int rank = 0;
  int num_ranks = 1;
  kernels::CpuSharing cpus;  // with how many ranks this one shares its CPUs
};

class MeetingLimit;

class Launch {
 public:
  // Under mpirun: ties this process's life to its parent's, then MPI_Init. Without mpirun's
  // environment MPI is never called; a worker that rank 0 has started (replacement.h) is told by it
  // who it is. Errors: unsupported when ranks span several hosts.
  Launch(int* argc, char*** argv);
  ~Launch();

  const Placement& placement() const { return placement_; }
  const std::optional<JoinOrder>& join_order() const { return join_order_; }
  // Whether the launcher lets the others go on when a rank dies.
  bool survives_deaths() const;

  // `text` of rank 0, on every rank; then leaves MPI. Every rank calls it once.
  std::string meet(const std::string& text);
  // Rank 0 cannot go on: others that wait in meet() get an empty text. Does nothing after meet().
  void call_off();

  // Leaves the process: flushed, no destructors. mpirun ends the job when `status` is not 0, unless
  // told to go on.
  [[noreturn]] void exit(int status) const;

 private:
  Placement placement_;
  std::optional<JoinOrder> join_order_;
  bool has_mpi_ = false;
  std::filesystem::path mpi_folder_;
  std::unique_ptr<MeetingLimit> limit_;  // while ranks meet
};

}  // namespace rollpack::rollout
