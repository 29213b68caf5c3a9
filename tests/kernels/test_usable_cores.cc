// Machines and containers as trees of files below a temporary folder.
#include "kernels/usable_cores.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <stdlib.h>

#include <cmath>
#include <fstream>
#include <thread>

namespace rollpack::kernels {
namespace {

namespace fs = std::filesystem;

class Machine {
 public:
  Machine() {
    std::string name = fs::temp_directory_path() / "rollpack-machine-XXXXXX";
    root_ = ::mkdtemp(name.data());
  }
  ~Machine() { fs::remove_all(root_); }

  Machine& file(const std::string& path, const std::string& text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text << "\n";
    return *this;
  }
  // CPU c and c + num_cores are threads of core c.
  Machine& cores(int num_cores, int threads_per_core, const char* file_name = "core_cpus_list") {
    for (int cpu = 0; cpu < num_cores * threads_per_core; ++cpu) {
      std::string siblings = std::to_string(cpu % num_cores);
      for (int thread = 1; thread < threads_per_core; ++thread) {
        siblings += ',';
        siblings += std::to_string(cpu % num_cores + thread * num_cores);
      }
      file("sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/" + file_name, siblings);
    }
    return *this;
  }
  UsableCores read(const std::vector<int>& cpus) const { return read_usable_cores(cpus, root_); }
  double granted() const { return read({0}).cgroup_cpus; }
  const fs::path& root() const { return root_; }

 private:
  fs::path root_;
};

constexpr const char* kV2Mount =
    "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate";

TEST(UsableCores, ThreadsOfOneCoreCountOnce) {
  Machine machine;
  machine.cores(4, 2);
  EXPECT_EQ(machine.read({0, 1, 2, 3, 4, 5, 6, 7}).num_cores, 4);
  EXPECT_EQ(machine.read({0, 4}).num_cores, 1);
  EXPECT_EQ(machine.read({0, 5, 6}).num_cores, 3);
  EXPECT_EQ(machine.read({0, 1, 2, 3, 4, 5, 6, 7}).num_cpus, 8);
}

TEST(UsableCores, OlderSystemsNameTheListOfSiblingsOtherwise) {
  Machine machine;
  EXPECT_EQ(machine.cores(2, 2, "thread_siblings_list").read({0, 1, 2, 3}).num_cores, 2);
}

TEST(UsableCores, WithoutATopologyEveryCpuIsACore) {
  const UsableCores cores = Machine().read({0, 1, 5});
  EXPECT_EQ(cores.num_cores, 3);
  EXPECT_EQ(cores.num_threads(), 3);
  EXPECT_EQ(cores.text(), "3 CPUs on 3 cores");
}

TEST(UsableCores, TheTightestGroupOfOursAndItsParentsCounts) {
  Machine machine;
  machine.file("proc/self/cgroup", "0::/kubepods/pod7/rollpack")
      .file("proc/self/mountinfo", kV2Mount)
      .file("sys/fs/cgroup/kubepods/cpu.max", "400000 100000")
      .file("sys/fs/cgroup/kubepods/pod7/cpu.max", "150000 100000")
      .file("sys/fs/cgroup/kubepods/pod7/rollpack/cpu.max", "max 100000");
  EXPECT_EQ(machine.granted(), 1.5);
  machine.file("sys/fs/cgroup/kubepods/pod7/rollpack/cpu.max", "50000 100000");
  EXPECT_EQ(machine.granted(), 0.5);
  machine.file("sys/fs/cgroup/kubepods/cpu.max", "25000 100000");
  EXPECT_EQ(machine.granted(), 0.25);
}

TEST(UsableCores, InAContainerTheMountShowsItsOwnGroup) {
  Machine machine;  // with a namespace of control groups
  machine.file("proc/self/cgroup", "0::/")
      .file("proc/self/mountinfo", kV2Mount)
      .file("sys/fs/cgroup/cpu.max", "200000 100000");
  EXPECT_EQ(machine.granted(), 2);
  Machine bound;  // without one
  bound.file("proc/self/cgroup", "0::/docker/4711/job")
      .file("proc/self/mountinfo", "31 23 0:28 /docker/4711 /sys/fs/cgroup ro - cgroup2 cgroup2 rw")
      .file("sys/fs/cgroup/cpu.max", "300000 100000")
      .file("sys/fs/cgroup/job/cpu.max", "125000 100000");
  EXPECT_EQ(bound.granted(), 1.25);
  Machine elsewhere;  // moved out of the group that is shown
  elsewhere.file("proc/self/cgroup", "0::/../other")
      .file("proc/self/mountinfo", kV2Mount)
      .file("sys/fs/cgroup/cpu.max", "300000 100000");
  EXPECT_EQ(elsewhere.granted(), 3);
}

TEST(UsableCores, VersionOneIsReadBesideVersionTwo) {
  Machine machine;
  machine.file("proc/self/cgroup", "4:memory:/m\n2:cpu,cpuacct:/slice/job\n3:cpuset:/\n0::/")
      .file("proc/self/mountinfo",
            "30 31 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
            "32 31 0:29 / /sys/fs/cgroup/cpu\\040time rw - cgroup cgroup rw,cpu,cpuacct\n"
            "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw")
      .file("sys/fs/cgroup/cpu time/slice/cpu.cfs_quota_us", "250000")
      .file("sys/fs/cgroup/cpu time/slice/cpu.cfs_period_us", "100000")
      .file("sys/fs/cgroup/cpu time/slice/job/cpu.cfs_quota_us", "-1")
      .file("sys/fs/cgroup/cpu time/slice/job/cpu.cfs_period_us", "100000");
  EXPECT_EQ(machine.granted(), 2.5);
}

TEST(UsableCores, WhatCannotBeReadLimitsNothing) {
  EXPECT_TRUE(std::isinf(Machine().granted()));
  Machine machine;
  machine.file("proc/self/cgroup", "0::/a").file("proc/self/mountinfo", kV2Mount);
  for (const char* text : {"", "max", "max 100000", "-1 100000", "0 100000", "1 2 3", "x y"}) {
    machine.file("sys/fs/cgroup/a/cpu.max", text);
    EXPECT_TRUE(std::isinf(machine.granted())) << text;
  }
  machine.file("proc/self/mountinfo", "31 23 - cgroup2\n\n- - -").file("proc/self/cgroup", "0:/a");
  EXPECT_TRUE(std::isinf(machine.granted()));
}

TEST(UsableCores, ProcessesShareCoresAndGrantedTimeAndHaveAThreadAtLeast) {
  const UsableCores cores = {.num_cpus = 16, .num_cores = 8, .cgroup_cpus = 5.5};
  EXPECT_EQ(cores.num_threads(), 6);
  EXPECT_EQ(cores.num_threads(2, 2), 3);
  EXPECT_EQ(cores.num_threads(4, 4), 2);
  EXPECT_EQ(cores.num_threads(16, 16), 1);
  EXPECT_EQ(cores.num_threads(1, 4), 2);  // masks of their own, one control group
  EXPECT_EQ(cores.text(), "16 CPUs on 8 cores, 5.5 granted by control groups");
}

TEST(UsableCores, ProcessesShareWithThoseWhoseMasksMeetTheirs) {
  const std::vector<std::vector<int>> unbound = {{0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}};
  EXPECT_EQ(sharing_of(unbound, 0).num_processes, 3);
  EXPECT_EQ(sharing_of(unbound, 2).num_processes, 3);
  EXPECT_EQ(sharing_of(unbound, 2).index, 2);
  const std::vector<std::vector<int>> by_node = {{0, 1}, {2, 3}, {0, 1}, {2, 3}, {4}};
  EXPECT_EQ(sharing_of(by_node, 3).num_processes, 2);
  EXPECT_EQ(sharing_of(by_node, 3).index, 1);
  EXPECT_EQ(sharing_of(by_node, 1).index, 0);
  EXPECT_EQ(sharing_of(by_node, 4).num_processes, 1);
  EXPECT_EQ(sharing_of(by_node, 4).index, 0);
}

TEST(UsableCores, CpusAreGroupedByMemoryNode) {
  Machine machine;
  EXPECT_EQ(cpus_by_node({0, 1}, machine.root()), (std::vector<std::vector<int>>{{0, 1}}));
  machine.file("sys/devices/system/node/node0/cpulist", "0-3,8-11")
      .file("sys/devices/system/node/node1/cpulist", "4-7,12-15")
      .file("sys/devices/system/node/node2/cpulist", "")  // memory without CPUs
      .file("sys/devices/system/node/possible", "0-2");
  EXPECT_EQ(cpus_by_node({2, 3, 4, 9, 15}, machine.root()),
            (std::vector<std::vector<int>>{{2, 3, 9}, {4, 15}}));
  EXPECT_EQ(cpus_by_node({8, 9}, machine.root()), (std::vector<std::vector<int>>{{8, 9}}));
  EXPECT_EQ(cpus_by_node({1, 4, 16}, machine.root()), (std::vector<std::vector<int>>{{1, 4, 16}}));
}

TEST(UsableCores, TheCallersAffinityMaskCounts) {
  std::thread([] {
    cpu_set_t one;
    CPU_ZERO(&one);
    const int cpu = sched_getcpu();
    CPU_SET(cpu, &one);
    ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
    EXPECT_EQ(affinity_cpus(), std::vector<int>{cpu});
    EXPECT_EQ(usable_cores().num_cpus, 1);
    EXPECT_EQ(usable_cores().num_threads(), 1);
  }).join();
}

}  // namespace
}  // namespace rollpack::kernels
