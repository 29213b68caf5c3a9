// What ranks exchange through host memory, each with an emulated device of its own.
#include "kernels/cuda/staged_communicator.h"

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <numeric>
#include <thread>
#include <vector>

#include "kernels/communicator/shared_memory_communicator.h"
#include "kernels/cuda/emulation/emulated_device.h"

namespace rollpack::kernels::cuda {
namespace {

using namespace std::chrono_literals;

// Calls body(communicator, device) on a thread a rank.
void on_ranks(int32_t size, const std::function<void(StagedCommunicator&, Device&)>& body) {
  std::vector<std::thread> threads;
  for (auto& host : make_thread_communicators(size, 30s, 4096)) {
    threads.emplace_back([&body, host = std::shared_ptr<Communicator>(std::move(host))] {
      const auto device = make_emulated_device();
      StagedCommunicator ranks(*device, device->make_stream(), host);
      body(ranks, *device);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Rows of which each rank has its own columns in place, as the ops leave them.
void gather(int64_t rows, const std::vector<int64_t>& starts) {
  on_ranks(static_cast<int32_t>(starts.size()) - 1, [&](StagedCommunicator& ranks, Device& device) {
    const auto rank = static_cast<size_t>(ranks.rank());
    const int64_t width = starts.back();
    const auto value = [&](int64_t row, int64_t column) {
      return static_cast<uint8_t>(row * 7 + column * 13 + 1);
    };
    const DeviceMemory memory(device, rows * width, "a test");
    auto* const all = memory.as<uint8_t>();
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = starts[rank]; c < starts[rank + 1]; ++c)
        all[row * width + c] = value(row, c);
    }
    ranks.gather_columns({.in = all + starts[rank],
                          .in_stride = width,
                          .out = all,
                          .out_stride = width,
                          .rows = rows,
                          .starts = starts});
    int64_t num_wrong = 0;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = 0; c < width; ++c) num_wrong += all[row * width + c] != value(row, c);
    }
    EXPECT_EQ(num_wrong, 0) << "rank " << rank << ", " << rows << " rows of " << width;
  });
}

TEST(StagedCommunicator, GathersUnevenColumns) {
  gather(5, {0, 12, 24, 33, 42});
  gather(3, {0, 0, 7, 7});
  gather(0, {0, 4, 8});
  gather(3000, {0, 1000, 3001});           // in several pieces
  gather(2, {0, 5 << 20, (5 << 20) + 3});  // rows longer than a piece
}

TEST(StagedCommunicator, ReducesAndBroadcasts) {
  on_ranks(3, [](StagedCommunicator& ranks, Device& device) {
    constexpr size_t kCount = 1'500'000;  // more than a piece has
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
    EXPECT_GT(ranks.seconds(), 0);
  });
}

TEST(StagedCommunicator, FailsWhereAnotherRankHasGivenUp) {
  on_ranks(2, [](StagedCommunicator& ranks, Device& device) {
    if (ranks.rank() == 1) return ranks.abandon();
    const DeviceMemory memory(device, 4, "a test");
    EXPECT_THROW(ranks.all_reduce<Reduction::kSum>(std::span(memory.as<uint32_t>(), 1)), Error);
  });
}

}  // namespace
}  // namespace rollpack::kernels::cuda
