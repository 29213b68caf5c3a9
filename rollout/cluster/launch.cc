#include "rollout/cluster/launch.h"

#include <mpi.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

#include <fmt/format.h>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

// Dies with mpirun, also when that is killed without a chance to clean up.
void die_with_parent() {
  const pid_t parent = ::getppid();
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) std::_Exit(1);  // it died before prctl took hold
}

bool is_under_mpirun() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"}) {
    if (std::getenv(name) != nullptr) return true;
  }
  return false;
}

// Open MPI puts a 4 MiB file a rank into /dev/shm and leaves it there when it is killed. All ranks
// agree on a folder of the job instead, whose files lose their names as soon as the ranks have met.
std::filesystem::path mpi_folder() {
  const char* job = std::getenv("PMIX_NAMESPACE");
  const char* base = std::getenv("TMPDIR");
  return std::filesystem::path(base != nullptr ? base : "/tmp") /
         fmt::format("rollpack-mpi-{}-{}", ::getuid(), job != nullptr ? job : "job");
}

// vader_segment.HOST.UID.JOB.RANK
std::filesystem::path own_file(const std::filesystem::path& folder) {
  const char* local_rank = std::getenv("OMPI_COMM_WORLD_LOCAL_RANK");
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename();
    if (local_rank != nullptr && name.ends_with(std::string(".") + local_rank)) return entry.path();
  }
  return {};
}

}  // namespace

Launch::Launch(int* argc, char*** argv) {
  if (!is_under_mpirun()) return;
  die_with_parent();
  meet(argc, argv);
  MPI_Comm host = MPI_COMM_NULL;
  int num_on_host = 0;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host);
  MPI_Comm_size(host, &num_on_host);
  MPI_Comm_free(&host);
  int fewest = 0;
  MPI_Allreduce(&num_on_host, &fewest, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
  if (fewest == placement_.num_ranks) return;
  throw Error({.code = ErrorCode::kUnsupported,
               .field = "ranks",
               .value = fmt::format("{} in all, {} on this host", placement_.num_ranks,
                                    num_on_host),
               .origin = "mpirun",
               .allowed = "all ranks on one host",
               .message = "several hosts are not built yet: start one job a host"});
}

void Launch::meet(int* argc, char*** argv) {
  mpi_folder_ = mpi_folder();
  std::error_code ignored;  // another rank may have made it; MPI_Init reports a folder it cannot use
  std::filesystem::create_directories(mpi_folder_, ignored);
  ::chmod(mpi_folder_.c_str(), 0700);
  ::setenv("OMPI_MCA_btl_vader_backing_directory", mpi_folder_.c_str(), /*overwrite=*/1);
  int provided = 0;
  MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided);
  has_mpi_ = true;
  MPI_Comm_rank(MPI_COMM_WORLD, &placement_.rank);
  MPI_Comm_size(MPI_COMM_WORLD, &placement_.num_ranks);
  placement_.job = mpi_folder_.filename().string();
  own_mpi_file_ = own_file(mpi_folder_);
  MPI_Barrier(MPI_COMM_WORLD);  // every rank has mapped its peers' files: their names may go
  std::filesystem::remove(own_mpi_file_, ignored);
  MPI_Barrier(MPI_COMM_WORLD);
  if (placement_.rank == 0) std::filesystem::remove_all(mpi_folder_, ignored);
}

std::string Launch::from_rank_0(const std::string& text) const {
  if (!has_mpi_) return text;
  int length = static_cast<int>(text.size());
  MPI_Bcast(&length, 1, MPI_INT, 0, MPI_COMM_WORLD);
  std::string received = text;
  received.resize(length);
  MPI_Bcast(received.data(), length, MPI_CHAR, 0, MPI_COMM_WORLD);
  return received;
}

void Launch::exit(int status) const {
  std::fflush(nullptr);
  if (has_mpi_ && status == 0) {
    // A peer that died in these last moments must not hold us: half a second is 100 times what
    // MPI_Finalize takes on one host.
    std::thread([] {
      std::this_thread::sleep_for(std::chrono::milliseconds(500));
      std::_Exit(0);
    }).detach();
    // MPI_Finalize unlinks the file it made and complains when it is gone: give it one to unlink.
    std::error_code ignored;
    if (!own_mpi_file_.empty()) {
      std::filesystem::create_directories(mpi_folder_, ignored);
      std::ofstream(own_mpi_file_).put(' ');
    }
    MPI_Finalize();
    std::filesystem::remove(mpi_folder_, ignored);  // the last rank finds it empty
  }
  std::_Exit(status);
}

}  // namespace rollpack::rollout
