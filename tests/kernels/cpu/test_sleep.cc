// Memory that goes back to the system and comes again.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "kernels/cpu/arena.h"
#include "toy_model.h"

namespace rollpack::kernels::testing {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

int64_t resident_bytes() {
  int64_t all = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> all >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

// As the kernel sees it, without a fault.
bool is_readable(const std::byte* at) {
  std::array<int, 2> ends{};
  if (pipe2(ends.data(), O_CLOEXEC) != 0) return false;
  const bool is_written = write(ends[1], at, 1) == 1;
  close(ends[0]);
  close(ends[1]);
  return is_written;
}

// Whether this process maps weights of a memfd or has one open.
bool has_shared_weights() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find("rollpack-weights") != std::string::npos) return true;
  }
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    const auto target = std::filesystem::read_symlink(entry, gone).string();
    if (target.find("rollpack-weights") != std::string::npos) return true;
  }
  return false;
}

TEST(SleepingArena, HasNoMemoryAndKeepsItsAddresses) {
  cpu::Arena arena = cpu::Arena::make_private(64 * kMiB, "test");
  std::byte* const at = arena.data();
  for (int round = 0; round < 3; ++round) {
    std::memset(arena.data(), 1, static_cast<size_t>(arena.bytes()));
    const int64_t full = resident_bytes();
    arena.release();
    EXPECT_LT(resident_bytes(), full - 60 * kMiB);
    EXPECT_FALSE(is_readable(at));
    EXPECT_FALSE(is_readable(at + arena.bytes() - 1));
    arena.take();
    EXPECT_EQ(arena.data(), at);
    EXPECT_EQ(at[0], std::byte{0});
    EXPECT_EQ(at[arena.bytes() - 1], std::byte{0});
    EXPECT_LT(resident_bytes(), full - 50 * kMiB) << "taken as it is touched";
  }
}

TEST(SleepingWeights, OfRanksThatShareThemAreGoneOnceAllHaveLetGo) {
  const auto make = [] {
    auto backend =
        make_cpu_backend({.D = 8, .H = 2, .G = 1, .K = 4, .F = 8, .V = 16, .L = 1},
                         {.num_threads = 1, .kv_cache_bytes = kMiB, .shared_weights = true});
    backend->declare_weight(
        {.name = "norm", .kind = WeightKind::kVector, .part_rows = {7}, .cols = 1});
    return backend;
  };
  const auto writer = make(), reader = make();
  const std::vector<float> values(7, 1.0f);
  writer->begin_staging();
  writer->load_weight(0, 0, {values.data(), DType::kF32, {1, 7}}, {0, 7});
  reader->adopt_staged_weights(writer->export_staged_weights());
  const int64_t adopted_bytes = reader->held_bytes();
  EXPECT_GE(writer->held_bytes(), adopted_bytes + 2 * kMiB) << "the copy is the writer's";
  writer->commit_weights();
  reader->commit_weights();
  EXPECT_TRUE(has_shared_weights());
  writer->sleep(2);
  EXPECT_TRUE(has_shared_weights()) << "the reader has a mapping yet";
  reader->sleep(2);
  EXPECT_FALSE(has_shared_weights());
}

}  // namespace
}  // namespace rollpack::kernels::testing
