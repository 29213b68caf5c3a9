// How many threads it pays to compute with: what the system lets this process use of the machine.
#pragma once

#include <filesystem>
#include <limits>
#include <string>
#include <vector>

namespace rollpack::kernels {

// More than any machine has.
inline constexpr int kMaxCpus = 1 << 14;

struct UsableCores {
  int num_cpus = 1;   // CPUs of the affinity mask
  int num_cores = 1;  // physical cores they belong to: a core's second thread multiplies no faster
  // CPUs' worth of time that the control groups grant, the tightest of ours and its parents.
  double cgroup_cpus = std::numeric_limits<double>::infinity();

  // Threads of each of `num_processes` processes of this control group, `num_sharing` of which
  // share the mask; at least 1. A fraction of a granted CPU is a thread: all are then stopped for a
  // part of each period, and still do more than one thread less.
  int num_threads(int num_sharing = 1, int num_processes = 1) const;

  // "2 CPUs on 2 cores" or "8 CPUs on 4 cores, 2.5 granted by control groups".
  std::string text() const;
};

// The calling thread's affinity mask, ascending; CPU 0 alone where it cannot be read.
std::vector<int> affinity_cpus();

// What may be used of `cpus` (ascending, not empty). Reads proc/self/{cgroup,mountinfo}, the cpu
// controller's files of control groups v1 and v2 and sys/devices/system/cpu below `root`, which
// stands for "/". What is missing or not understood there limits nothing.
UsableCores read_usable_cores(const std::vector<int>& cpus,
                              const std::filesystem::path& root = "/");

// What the calling thread may use.
UsableCores usable_cores();

// Of some processes, those that compute on the same CPUs as one of them, itself included.
struct CpuSharing {
  int num_processes = 1;
  int index = 0;  // of the one among them
};

// Who shares CPUs with process `own`, given the affinity masks of all.
CpuSharing sharing_of(const std::vector<std::vector<int>>& masks, int own);

// `cpus` by memory node, nodes ascending, those without any of them left out; one group where the
// system tells of no nodes. Reads sys/devices/system/node below `root`.
std::vector<std::vector<int>> cpus_by_node(const std::vector<int>& cpus,
                                           const std::filesystem::path& root = "/");

}  // namespace rollpack::kernels
