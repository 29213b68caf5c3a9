// Ranks as threads: what they give arrives whole and in place, whatever its size; a rank that does
// not come, or has failed, is named; ranks that make different calls are told so.
#include "kernels/communicator/communicator.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/communicator/shared_memory_communicator.h"

namespace rollpack::kernels {
namespace {

using namespace std::chrono_literals;
using Ranks = std::vector<std::unique_ptr<Communicator>>;

// A sum of floats must not compile.
template <class T, Reduction R>
concept CanReduce = requires(Communicator& c, std::span<T> values) {
  c.all_reduce<R>(values);
};
static_assert(CanReduce<int32_t, Reduction::kSum> && CanReduce<uint8_t, Reduction::kMax>);
static_assert(CanReduce<float, Reduction::kMax> && CanReduce<double, Reduction::kMin>);
static_assert(!CanReduce<float, Reduction::kSum> && !CanReduce<double, Reduction::kSum>);

// Runs body on every rank but `absent`; the errors, "" where there was none.
std::vector<std::string> run(Ranks& ranks, const std::function<void(Communicator&)>& body,
                             int32_t absent = -1) {
  std::vector<std::string> errors(ranks.size());
  std::vector<std::thread> threads;
  for (size_t r = 0; r < ranks.size(); ++r) {
    if (static_cast<int32_t>(r) == absent) continue;
    threads.emplace_back([&, r] {
      try {
        body(*ranks[r]);
      } catch (const Error& error) {
        errors[r] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return errors;
}

void expect_no_errors(const std::vector<std::string>& errors) {
  for (const std::string& error : errors) EXPECT_EQ(error, "");
}

uint8_t byte_at(int64_t row, int64_t column) {
  return static_cast<uint8_t>(row * 131 + column * 7 + 1);
}

class CommunicatorOfRanks : public ::testing::TestWithParam<int32_t> {};

// Slots of 64 bytes: almost everything takes several rounds.
TEST_P(CommunicatorOfRanks, GathersUnevenColumnsInPlaceAndApart) {
  const int32_t size = GetParam();
  std::mt19937 random(static_cast<uint32_t>(size));
  for (int trial = 0; trial < 60; ++trial) {
    Ranks ranks = make_thread_communicators(size, 20s, trial % 2 == 0 ? 64 : 4096);
    const int64_t rows = random() % 9;
    std::vector<int64_t> starts = {0};
    for (int32_t r = 0; r < size; ++r) {
      starts.push_back(starts.back() +
                       static_cast<int64_t>(random() % 4 == 0 ? 0 : random() % 150));
    }
    const int64_t cols = starts.back();
    const bool is_in_place = trial % 3 != 0;
    expect_no_errors(run(ranks, [&](Communicator& c) {
      const auto r = static_cast<size_t>(c.rank());
      const int64_t begin = starts[r], width = starts[r + 1] - begin;
      std::vector<uint8_t> all(static_cast<size_t>(rows * cols)), own;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t k = 0; k < width; ++k) own.push_back(byte_at(row, begin + k));
        if (!is_in_place) continue;
        std::copy_n(own.end() - width, width, all.begin() + row * cols + begin);
      }
      c.gather_columns({.in = is_in_place ? all.data() + begin : own.data(),
                        .in_stride = is_in_place ? cols : width,
                        .out = all.data(),
                        .out_stride = cols,
                        .rows = rows,
                        .starts = starts});
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t k = 0; k < cols; ++k) {
          ASSERT_EQ(all[static_cast<size_t>(row * cols + k)], byte_at(row, k))
              << "trial " << trial << ", row " << row << ", column " << k;
        }
      }
    }));
  }
}

TEST_P(CommunicatorOfRanks, GathersReducesAndBroadcastsEveryLength) {
  const int32_t size = GetParam();
  Ranks ranks = make_thread_communicators(size, 20s, 128);
  expect_no_errors(run(ranks, [&](Communicator& c) {
    for (const int64_t n : {0, 1, 31, 32, 33, 200}) {
      const auto count = static_cast<size_t>(n);
      std::vector<int32_t> sums(count), mine(count), all(count * static_cast<size_t>(size));
      std::vector<double> lows(count);
      std::vector<uint8_t> highs(count), root(count);
      for (size_t i = 0; i < count; ++i) {
        mine[i] = c.rank() * 1000 + static_cast<int32_t>(i);
        // Sums of integers wrap: bits of floats pass through them.
        sums[i] = c.rank() == 0 ? std::numeric_limits<int32_t>::max() : 1;
        lows[i] = 0.5 * (c.rank() + static_cast<double>(i));
        highs[i] = static_cast<uint8_t>(c.rank() + static_cast<int32_t>(i));
        root[i] = static_cast<uint8_t>(c.rank() == size - 1 ? 7 + i : 0);
      }
      c.all_gather(std::as_bytes(std::span(mine)), std::as_writable_bytes(std::span(all)));
      c.all_reduce<Reduction::kSum>(std::span(sums));
      c.all_reduce<Reduction::kMin>(std::span(lows));
      c.all_reduce<Reduction::kMax>(std::span(highs));
      c.broadcast(std::as_writable_bytes(std::span(root)), size - 1);
      c.barrier();
      for (size_t i = 0; i < count; ++i) {
        for (int32_t r = 0; r < size; ++r) {
          ASSERT_EQ(all[static_cast<size_t>(r) * count + i], r * 1000 + static_cast<int32_t>(i));
        }
        const auto wrapped = static_cast<uint32_t>(std::numeric_limits<int32_t>::max()) +
                             static_cast<uint32_t>(size - 1);
        ASSERT_EQ(sums[i], static_cast<int32_t>(wrapped));
        ASSERT_EQ(lows[i], 0.5 * static_cast<double>(i));
        ASSERT_EQ(highs[i], static_cast<uint8_t>(size - 1 + static_cast<int32_t>(i)));
        ASSERT_EQ(root[i], static_cast<uint8_t>(7 + i));
      }
    }
  }));
}

INSTANTIATE_TEST_SUITE_P(Sizes, CommunicatorOfRanks, ::testing::Values(1, 2, 3, 4, 7));

TEST(Communicator, NamesTheRankThatDoesNotCome) {
  Ranks ranks = make_thread_communicators(3, 150ms);
  const std::vector<std::string> errors = run(
      ranks, [](Communicator& c) { c.barrier(); }, /*absent=*/1);
  for (const size_t r : {0u, 2u}) {
    EXPECT_TRUE(
        errors[r].starts_with("barrier = rank 1 of 3 ranks of this replica is missing: it "))
        << errors[r];
  }
  // One of them found the deadline over, and the other may have heard so from it.
  EXPECT_TRUE(errors[0].find("it did not come in ") != std::string::npos ||
              errors[2].find("it did not come in ") != std::string::npos)
      << errors[0] << errors[2];
  // Nothing comes back to life.
  try {
    ranks[0]->barrier();
    FAIL() << "a call after a failed one";
  } catch (const Error& error) {
    EXPECT_EQ(error.info.code, ErrorCode::kFailedPrecondition);
  }
}

TEST(Communicator, EndsAtOnceForAllWhereOneHasFailed) {
  Ranks ranks = make_thread_communicators(3, 60s);
  const auto start = std::chrono::steady_clock::now();
  const std::vector<std::string> errors = run(ranks, [](Communicator& c) {
    if (c.rank() == 2) return c.abandon();
    std::vector<float> values(10);
    c.all_reduce<Reduction::kMax>(std::span(values));
  });
  EXPECT_LT(std::chrono::steady_clock::now() - start, 30s);
  for (const size_t r : {0u, 1u}) {
    EXPECT_EQ(errors[r],
              "all_reduce = rank 2 of 3 ranks of this replica is missing: it has failed, or its "
              "process has ended");
  }
  EXPECT_EQ(errors[2], "");
}

TEST(Communicator, AsksWhichProcessHasEnded) {
  const auto bytes = static_cast<size_t>(SharedMemoryCommunicator::region_bytes(2));
  const std::shared_ptr<std::byte> region(static_cast<std::byte*>(std::aligned_alloc(64, bytes)),
                                          std::free);
  std::memset(region.get(), 0, bytes);
  SharedMemoryCommunicator alone(
      region, {.at = {0, 2}, .timeout = 60s, .find_lost_rank = [] { return 1; }});
  try {
    alone.barrier();
    FAIL() << "a rank that has ended";
  } catch (const Error& error) {
    EXPECT_EQ(error.info.code, ErrorCode::kUnavailable);
    EXPECT_EQ(error.info.value, "rank 1 of 2 ranks of this replica is missing");
  }
  EXPECT_GT(alone.seconds(), 0);
}

TEST(Communicator, RefusesCallsThatDiffer) {
  Ranks ranks = make_thread_communicators(2, 20s);
  const std::vector<std::string> errors = run(ranks, [](Communicator& c) {
    std::vector<int32_t> values(static_cast<size_t>(3 + c.rank()));
    c.all_reduce<Reduction::kSum>(std::span(values));
  });
  EXPECT_NE(errors[0].find("all_reduce = rank 1 makes another call than rank 0"), std::string::npos)
      << errors[0];
  EXPECT_NE(errors[1], "");
}

TEST(Shards, CoverEverythingOnceInRankOrder) {
  for (int32_t size = 1; size <= 9; ++size) {
    for (const int64_t columns : {1, 5, 40, 63, 64, 576, 577, 4864, 151936}) {
      int64_t end = 0, end_v = 0;
      for (int32_t r = 0; r < size; ++r) {
        const ShardRange shard = column_shard(columns, {r, size});
        const ShardRange block = vocabulary_shard(columns, {r, size});
        EXPECT_EQ(shard.begin, end);
        EXPECT_EQ(block.begin, end_v);
        EXPECT_TRUE(block.begin % 1024 == 0 || block.begin == columns);
        EXPECT_LE(shard.size(), columns / size + 64);
        EXPECT_LE(block.size(), columns / size + 1024);
        end = shard.end;
        end_v = block.end;
      }
      EXPECT_EQ(end, columns);
      EXPECT_EQ(end_v, columns);
    }
  }
}

TEST(Shards, GiveEveryQueryHeadOnceAndTheKvHeadsItUses) {
  const std::vector<std::pair<int64_t, int64_t>> models = {{14, 2}, {9, 3},  {32, 8}, {4, 4},
                                                           {8, 1},  {15, 5}, {6, 2}};
  for (const auto& [H, G] : models) {
    for (int32_t size = 1; size <= H && size <= 9; ++size) {
      int64_t end = 0, most = 0;
      for (int32_t r = 0; r < size; ++r) {
        const HeadShard shard = head_shard(H, G, {r, size});
        ASSERT_EQ(shard.query.begin, end)
            << H << " heads, " << G << " KV, rank " << r << "/" << size;
        ASSERT_GT(shard.query.size(), 0);
        // As many query heads for each KV head, and the right ones.
        ASSERT_EQ(shard.query.size() % shard.kv.size(), 0);
        ASSERT_EQ(shard.query.begin / (H / G), shard.kv.begin);
        ASSERT_EQ((shard.query.end - 1) / (H / G), shard.kv.end - 1);
        end = shard.query.end;
        most = std::max(most, shard.kv.size());
      }
      ASSERT_EQ(end, H);
      ASSERT_EQ(most, (G + size - 1) / size);
    }
  }
  const HeadShard last = head_shard(14, 2, {3, 4});
  EXPECT_EQ(last.query, (ShardRange{11, 14}));
  EXPECT_EQ(last.kv, (ShardRange{1, 2}));
}

}  // namespace
}  // namespace rollpack::kernels
