// How this process was started: alone, or as one rank of an mpirun. MPI is used here and nowhere else,
// and only while ranks meet: to learn who they are and where rank 0's socket is. Afterwards ranks
// talk by socket, because Open MPI 4.1 never reports a dead peer.
#pragma once

#include <filesystem>
#include <string>

namespace rollpack::rollout {

struct Placement {
  int rank = 0;
  int num_ranks = 1;
  std::string job;  // equal on all ranks of a job, unique on the host; empty without mpirun
};

class Launch {
 public:
  // Under mpirun: ties this process's life to its parent's, then MPI_Init. Without mpirun's
  // environment MPI is never called. Errors: unsupported when ranks span several hosts.
  Launch(int* argc, char*** argv);

  const Placement& placement() const { return placement_; }
  // `text` of rank 0, on every rank.
  std::string from_rank_0(const std::string& text) const;

  // Leaves MPI and the process: flushed, no destructors, no collective that a dead rank could block.
  // A failed rank (`status` != 0) skips MPI_Finalize, so that mpirun ends the job at once.
  [[noreturn]] void exit(int status) const;

 private:
  void meet(int* argc, char*** argv);

  Placement placement_;
  bool has_mpi_ = false;
  std::filesystem::path mpi_folder_;
  std::filesystem::path own_mpi_file_;
};

}  // namespace rollpack::rollout
