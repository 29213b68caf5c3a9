// What ranks exchange from device to device, each with an emulated device of its own: through host
// memory, and by what stands in for NCCL (fake_nccl.cc).
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <numeric>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/communicator/shared_memory_communicator.h"
#include "kernels/cuda/device_link.h"
#include "kernels/cuda/emulation/emulated_device.h"

namespace rollpack::kernels::cuda {
namespace {

using namespace std::chrono_literals;

std::shared_ptr<const NcclLibrary> open_fake() {
  return std::make_shared<const NcclLibrary>(FAKE_NCCL);
}

struct RankSetup {
  EmulatedDeviceOptions device;
  OpenNccl open = open_fake;
};

// Calls body(communicator, device) on a thread a rank.
void on_ranks(
    int32_t size, const std::vector<std::byte>& link,
    const std::function<void(DeviceCommunicator&, Device&)>& body,
    const std::function<RankSetup(int32_t)>& setup = [](int32_t) { return RankSetup(); }) {
  std::vector<std::thread> threads;
  for (auto& host : make_thread_communicators(size, 30s, 4096)) {
    threads.emplace_back([&, host = std::shared_ptr<Communicator>(std::move(host))] {
      const RankSetup own = setup(host->rank());
      const auto device = make_emulated_device(own.device);
      const auto ranks = link_devices(*device, device->make_stream(), host, link, own.open);
      body(*ranks, *device);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

class DeviceCommunicators : public ::testing::TestWithParam<bool> {
 protected:
  std::vector<std::byte> link() const {
    return GetParam() ? make_nccl_link(open_fake) : std::vector<std::byte>();
  }

  // Rows of which each rank has its own columns in place, as the ops leave them. No byte beside
  // the rows may change.
  void gather(int64_t rows, const std::vector<int64_t>& starts, int64_t stride) {
    on_ranks(static_cast<int32_t>(starts.size()) - 1, link(),
             [&](DeviceCommunicator& ranks, Device& device) {
               const auto rank = static_cast<size_t>(ranks.rank());
               const DeviceMemory memory(device, rows * stride, "a test");
               auto* const all = memory.as<uint8_t>();
               const auto value = [](int64_t row, int64_t column) {
                 return static_cast<uint8_t>(row * 7 + column * 13 + 1);
               };
               for (int64_t row = 0; row < rows; ++row) {
                 for (int64_t c = starts[rank]; c < starts[rank + 1]; ++c) {
                   all[row * stride + c] = value(row, c);
                 }
               }
               ranks.gather_columns({.in = all + starts[rank],
                                     .in_stride = stride,
                                     .out = all,
                                     .out_stride = stride,
                                     .rows = rows,
                                     .starts = starts});
               int64_t num_wrong = 0;
               for (int64_t row = 0; row < rows; ++row) {
                 for (int64_t c = 0; c < stride; ++c) {
                   const uint8_t wanted = c < starts.back() ? value(row, c) : 0;
                   num_wrong += all[row * stride + c] != wanted;
                 }
               }
               EXPECT_EQ(num_wrong, 0) << "rank " << rank << ", " << rows << " rows of " << stride;
             });
  }
};

INSTANTIATE_TEST_SUITE_P(Ways, DeviceCommunicators, ::testing::Bool(), [](const auto& info) {
  return std::string(info.param ? "Nccl" : "Staged");
});

TEST_P(DeviceCommunicators, GatherUnevenColumns) {
  gather(5, {0, 12, 24, 33, 42}, 42);
  gather(5, {0, 16, 48, 64}, 80);  // parts aligned to 16 bytes
  gather(3, {0, 0, 7, 7}, 9);
  gather(0, {0, 4, 8}, 8);
  gather(3000, {0, 1000, 3001}, 3001);                      // in several pieces
  gather(2, {0, 5 << 20, (5 << 20) + 3}, (5 << 20) + 3);    // rows longer than a staged piece
  gather(5, {0, 5 << 20, (5 << 20) + 64}, (5 << 20) + 64);  // more than NCCL's workspace
}

TEST_P(DeviceCommunicators, ReduceAndBroadcast) {
  on_ranks(3, link(), [](DeviceCommunicator& ranks, Device& device) {
    constexpr size_t kCount = 1'500'000;  // more than a staged piece has
    const DeviceMemory memory(device, kCount * 4, "a test");
    const std::span<uint32_t> words(memory.as<uint32_t>(), kCount);
    const auto rank = static_cast<uint32_t>(ranks.rank());
    for (size_t i = 0; i < kCount; ++i) words[i] = i % 3 == rank ? static_cast<uint32_t>(i) : 0;
    ranks.all_reduce<Reduction::kSum>(words);
    size_t num_right = 0;
    for (size_t i = 0; i < kCount; ++i) num_right += words[i] == i;
    EXPECT_EQ(num_right, kCount);

    const std::span<uint8_t> flags(memory.as<uint8_t>(), 5);
    for (size_t i = 0; i < 5; ++i) flags[i] = i == rank ? 1 : 0;
    ranks.all_reduce<Reduction::kMax>(flags);
    EXPECT_EQ(std::vector<uint8_t>(flags.begin(), flags.end()),
              (std::vector<uint8_t>{1, 1, 1, 0, 0}));

    std::iota(words.begin(), words.end(), rank * 5);
    ranks.broadcast(std::as_writable_bytes(words), 1);
    EXPECT_EQ(words[0], 5u);
    EXPECT_EQ(words[kCount - 1], kCount + 4);
    for (int i = 0; i < 20; ++i) ranks.all_reduce<Reduction::kMin>(words.first(3));
    EXPECT_EQ(words[2], 7u);
    EXPECT_GT(ranks.seconds(), 0);
    ranks.barrier();  // nobody ends while another still reads
  });
}

TEST_P(DeviceCommunicators, FailWhereAnotherRankHasGivenUp) {
  on_ranks(2, link(), [](DeviceCommunicator& ranks, Device& device) {
    if (ranks.rank() == 1) return ranks.abandon();
    const DeviceMemory memory(device, 4, "a test");
    const std::span words(memory.as<uint32_t>(), 1);
    EXPECT_THROW(ranks.all_reduce<Reduction::kSum>(words), Error);
    EXPECT_THROW(ranks.all_reduce<Reduction::kSum>(words), Error);
  });
}

// Ranks that cannot all use NCCL say why, and exchange all the same.
std::string way_of(const std::function<RankSetup(int32_t)>& setup) {
  std::string way;
  on_ranks(
      3, make_nccl_link(open_fake),
      [&](DeviceCommunicator& ranks, Device& device) {
        const DeviceMemory memory(device, 4, "a test");
        *memory.as<uint32_t>() = 2;
        ranks.all_reduce<Reduction::kSum>(std::span(memory.as<uint32_t>(), 1));
        EXPECT_EQ(*memory.as<uint32_t>(), 6u);
        if (ranks.rank() == 1) way = ranks.description();
        ranks.barrier();
      },
      setup);
  return way;
}

TEST(DeviceLink, FallsBackToHostMemoryAndSaysWhy) {
  EXPECT_EQ(way_of([](int32_t) { return RankSetup(); }), "by NCCL 2.28.9");
  EXPECT_EQ(way_of([](int32_t rank) { return RankSetup{.device = {.number = rank == 0 ? 5 : 6}}; }),
            "through host memory (ranks 1 and 2 share a device, which NCCL refuses)");
  const std::string way = way_of([](int32_t rank) -> RankSetup {
    if (rank != 1) return {};
    return {.open = [] { return std::make_shared<const NcclLibrary>("libnccl_nowhere.so.2"); }};
  });
  EXPECT_NE(way.find("through host memory (rank 1 has no NCCL: NCCL = libnccl_nowhere.so.2"),
            std::string::npos)
      << way;
}

}  // namespace
}  // namespace rollpack::kernels::cuda
