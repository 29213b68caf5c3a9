// How this process was started: alone, or as one rank of an mpirun. MPI is used here and nowhere
// else, and only while ranks meet: to learn who they are and where rank 0's socket is. Then it is
// left, so that no death can block it and no crash leaves its files behind; ranks go on by socket.
#pragma once

#include <filesystem>
#include <string>

#include "kernels/usable_cores.h"

namespace rollpack::rollout {

struct Placement {
  int rank = 0;
  int num_ranks = 1;
  kernels::CpuSharing cpus;  // with how many ranks this one shares its CPUs
};

class Launch {
 public:
  // Under mpirun: ties this process's life to its parent's, then MPI_Init. Without mpirun's
  // environment MPI is never called. Errors: unsupported when ranks span several hosts.
  Launch(int* argc, char*** argv);

  const Placement& placement() const { return placement_; }

  // `text` of rank 0, on every rank; then leaves MPI. Every rank calls it once.
  std::string meet(const std::string& text);

  // Leaves the process: flushed, no destructors. mpirun ends the job when `status` is not 0.
  [[noreturn]] static void exit(int status);

 private:
  Placement placement_;
  bool has_mpi_ = false;
  std::filesystem::path mpi_folder_;
};

}  // namespace rollpack::rollout
