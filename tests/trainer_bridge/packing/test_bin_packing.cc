// Packing on generated lengths against what it promises, and against exhaustive search where that
// is possible.
#include "trainer_bridge/packing/bin_packing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <ctime>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "tests/error_text.h"
#include "tests/sanitized.h"

namespace rollpack::bridge {
namespace {

using Lengths = std::vector<int64_t>;
using Bins = std::vector<std::vector<int32_t>>;
using testing::error_text;

Lengths random_lengths(std::mt19937& random, size_t num, int64_t longest) {
  std::uniform_int_distribution<int64_t> length(0, longest);
  Lengths lengths(num);
  for (int64_t& each : lengths) each = length(random);
  return lengths;
}

int64_t fill_of(const Lengths& lengths, const std::vector<int32_t>& bin) {
  return std::accumulate(bin.begin(), bin.end(), int64_t{0},
                         [&](int64_t sum, int32_t item) { return sum + lengths[item]; });
}

// Fewest bins that hold all items, over all subsets: the best (bins used, fill of the last one)
// that a subset can reach comes from the best of the subset without its last item.
int64_t fewest_bins(const Lengths& lengths, int64_t capacity) {
  const size_t num_subsets = size_t{1} << lengths.size();
  std::vector<std::pair<int64_t, int64_t>> best(num_subsets, {INT64_MAX, 0});
  best[0] = {0, capacity};
  for (size_t subset = 0; subset < num_subsets; ++subset) {
    for (size_t i = 0; i < lengths.size(); ++i) {
      if ((subset >> i & 1) != 0) continue;
      auto [bins, fill] = best[subset];
      const bool fits = bins > 0 && fill + lengths[i] <= capacity;
      std::pair<int64_t, int64_t> next = {fits ? bins : bins + 1, (fits ? fill : 0) + lengths[i]};
      best[subset | size_t{1} << i] = std::min(best[subset | size_t{1} << i], next);
    }
  }
  return best.back().first;
}

TEST(BinPacking, EveryItemIsInOneBinAndNoBinExceedsTheCapacity) {
  std::mt19937 random(1);
  for (const size_t num : {0, 1, 2, 3, 17, 256, 1000}) {
    for (const int64_t capacity : {1, 7, 64, 16384, 2147483647}) {
      const Lengths lengths = random_lengths(random, num, capacity);
      const Bins bins = pack_best_fit_decreasing(lengths, capacity);
      std::vector<int32_t> items;
      for (const std::vector<int32_t>& bin : bins) {
        ASSERT_FALSE(bin.empty());
        EXPECT_LE(fill_of(lengths, bin), capacity) << num << " items, capacity " << capacity;
        items.insert(items.end(), bin.begin(), bin.end());
      }
      std::sort(items.begin(), items.end());
      std::vector<int32_t> all(num);
      std::iota(all.begin(), all.end(), 0);
      EXPECT_EQ(items, all) << num << " items, capacity " << capacity;
    }
  }
}

TEST(BinPacking, ItemsAscendInABinAndBinsAreOrderedByTheirFirstItem) {
  std::mt19937 random(2);
  const Bins bins = pack_best_fit_decreasing(random_lengths(random, 500, 900), 1000);
  for (size_t b = 0; b < bins.size(); ++b) {
    EXPECT_TRUE(std::is_sorted(bins[b].begin(), bins[b].end())) << "bin " << b;
    if (b > 0) {
      EXPECT_LT(bins[b - 1].front(), bins[b].front()) << "bin " << b;
    }
  }
}

TEST(BinPacking, AnItemGoesWhereItLeavesTheLeastSpace) {
  // First fit would put the last item beside the 8.
  EXPECT_EQ(pack_best_fit_decreasing(Lengths{8, 5, 4, 1}, 10), (Bins{{0}, {1, 2, 3}}));
}

TEST(BinPacking, TiesGoToTheLowerItemAndTheLowerBin) {
  EXPECT_EQ(pack_best_fit_decreasing(Lengths{6, 6, 6, 4}, 10), (Bins{{0, 3}, {1}, {2}}));
  EXPECT_EQ(pack_best_fit_decreasing(Lengths{4, 6, 4, 6, 4}, 10), (Bins{{0, 1}, {2, 3}, {4}}));
}

TEST(BinPacking, LengthsOfZeroAndOfTheWholeCapacityAreLegal) {
  EXPECT_EQ(pack_best_fit_decreasing(Lengths{0, 10, 0, 10}, 10), (Bins{{0, 1, 2}, {3}}));
  EXPECT_EQ(pack_best_fit_decreasing(Lengths{0, 0}, 1), (Bins{{0, 1}}));
  EXPECT_EQ(pack_best_fit_decreasing(Lengths{}, 1), Bins{});
}

TEST(BinPacking, StaysWithinElevenNinthsOfTheFewestBins) {
  std::mt19937 random(3);
  int64_t num_optimal = 0;
  constexpr int kCases = 600;
  for (int c = 0; c < kCases; ++c) {
    const int64_t capacity = 5 + c % 40;
    const Lengths lengths =
        random_lengths(random, 1 + c % 10, 1 + (capacity - 1) * (c % 3 + 1) / 3);
    const auto got = static_cast<int64_t>(pack_best_fit_decreasing(lengths, capacity).size());
    const int64_t fewest = fewest_bins(lengths, capacity);
    EXPECT_GE(got, fewest) << "case " << c;
    EXPECT_LE(9 * got, 11 * fewest + 6) << "case " << c;
    num_optimal += got == fewest;
  }
  EXPECT_GE(num_optimal, kCases * 9 / 10);
}

TEST(BinPacking, UsesOneBinExactlyWhenAllItemsFitOne) {
  std::mt19937 random(4);
  for (int c = 0; c < 200; ++c) {
    const Lengths lengths = random_lengths(random, 1 + c % 12, 20);
    const int64_t total = std::max<int64_t>(std::reduce(lengths.begin(), lengths.end()), 20);
    EXPECT_EQ(pack_best_fit_decreasing(lengths, total).size(), 1u) << "case " << c;
    if (total > 20) {
      EXPECT_GT(pack_best_fit_decreasing(lengths, total - 1).size(), 1u) << "case " << c;
    }
  }
}

TEST(BinPacking, NoTwoBinsCouldBeOne) {
  std::mt19937 random(5);
  const Lengths lengths = random_lengths(random, 2000, 700);
  std::vector<int64_t> fills;
  for (const std::vector<int32_t>& bin : pack_best_fit_decreasing(lengths, 1000)) {
    fills.push_back(fill_of(lengths, bin));
  }
  std::sort(fills.begin(), fills.end());
  EXPECT_GT(fills[0] + fills[1], 1000);
}

// CPU seconds of this process, as machines are shared; the least of three.
double seconds_to_pack(const Lengths& lengths) {
  double least = 1e9;
  for (int i = 0; i < 3; ++i) {
    const std::clock_t start = std::clock();
    const Bins bins = pack_best_fit_decreasing(lengths, 16384);
    least = std::min(least, static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
    const int64_t total = std::reduce(lengths.begin(), lengths.end());
    EXPECT_GE(static_cast<int64_t>(bins.size()), (total + 16383) / 16384);
  }
  return least;
}

TEST(BinPacking, TenTimesTheItemsTakeFarLessThanAHundredTimesTheTime) {
  std::mt19937 random(6);
  // One length for all, so that every bin is a candidate of every item, and lengths of all sizes.
  const auto cases = [&](size_t count) {
    return std::vector<Lengths>{Lengths(count, 3), random_lengths(random, count, 16384),
                                Lengths(count, 9000)};
  };
  constexpr size_t kFew = kIsSanitized ? 1'000 : 10'000;
  const std::vector<Lengths> few = cases(kFew), many = cases(10 * kFew);
  for (size_t i = 0; i < few.size(); ++i) {
    // n log n is 12.5 times; caches add to it, and short times are coarse.
    EXPECT_LT(seconds_to_pack(many[i]), 40 * (seconds_to_pack(few[i]) + 1e-4)) << "case " << i;
  }
}

TEST(BinPacking, ErrorNamesTheItemItsLengthAndTheCapacity) {
  EXPECT_EQ(error_text([] {
              pack_best_fit_decreasing(Lengths{3, 11, 12}, 10);
            }),
            "invalid_argument: lengths[1] = 11: expected 0 to 10, the capacity of a bin; an item "
            "is never split");
  EXPECT_EQ(error_text([] {
              pack_best_fit_decreasing(Lengths{3, 4, -1}, 10);
            }),
            "invalid_argument: lengths[2] = -1: expected 0 to 10, the capacity of a bin; an item "
            "is never split");
}

}  // namespace
}  // namespace rollpack::bridge
