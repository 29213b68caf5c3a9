// Balanced partitions and the plans made of them, on generated costs against what they promise, and
// against exhaustive search where that is possible.
#include "trainer_bridge/packing/partition.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <set>

#include "tests/error_text.h"
#include "trainer_bridge/packing/bin_packing.h"
#include "trainer_bridge/packing/dp_plan.h"

namespace rollpack::bridge {
namespace {

using Numbers = std::vector<int64_t>;
using Parts = std::vector<std::vector<int32_t>>;
using testing::error_text;

Numbers random_numbers(std::mt19937& random, size_t num, int64_t least, int64_t largest) {
  std::uniform_int_distribution<int64_t> number(least, largest);
  Numbers numbers(num);
  for (int64_t& each : numbers) each = number(random);
  return numbers;
}

int64_t sum_of(const Numbers& values, const std::vector<int32_t>& items) {
  int64_t sum = 0;
  for (const int32_t item : items) sum += values[item];
  return sum;
}

int64_t largest_sum(const Numbers& costs, const Parts& parts) {
  int64_t largest = 0;
  for (const std::vector<int32_t>& part : parts) largest = std::max(largest, sum_of(costs, part));
  return largest;
}

// The least largest sum, by trying every assignment.
int64_t least_largest_sum(const Numbers& costs, int32_t num_parts, size_t next, Numbers& sums) {
  if (next == costs.size()) return *std::ranges::max_element(sums);
  int64_t least = INT64_MAX;
  for (int32_t p = 0; p < num_parts; ++p) {
    sums[p] += costs[next];
    least = std::min(least, least_largest_sum(costs, num_parts, next + 1, sums));
    sums[p] -= costs[next];
    if (sums[p] == 0) break;  // empty parts are alike
  }
  return least;
}

void expect_every_item_once(const Parts& parts, size_t num_items) {
  std::vector<int32_t> all;
  for (const std::vector<int32_t>& part : parts) all.insert(all.end(), part.begin(), part.end());
  std::ranges::sort(all);
  std::vector<int32_t> expected(num_items);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(all, expected);
}

TEST(Partition, EveryItemIsInOnePartAndEqualSizesDifferByOneAtMost) {
  std::mt19937 random(1);
  for (const size_t num : {0, 1, 2, 7, 64, 501}) {
    for (const int32_t num_parts : {1, 2, 3, 8, 64}) {
      const Numbers costs = random_numbers(random, num, 0, 1 << 20);
      for (const PartSizes sizes : {PartSizes::kAny, PartSizes::kEqual}) {
        const Parts parts = partition_balanced(costs, num_parts, sizes);
        ASSERT_EQ(parts.size(), static_cast<size_t>(num_parts));
        expect_every_item_once(parts, num);
        if (sizes == PartSizes::kAny) continue;
        const auto [least, most] = std::ranges::minmax(
            parts, {}, [](const std::vector<int32_t>& part) { return part.size(); });
        EXPECT_LE(most.size() - least.size(), 1u) << num << " items, " << num_parts << " parts";
      }
    }
  }
}

TEST(Partition, TheLargestSumIsNearTheLeastPossible) {
  std::mt19937 random(2);
  for (int32_t trial = 0; trial < 60; ++trial) {
    const int32_t num_parts = 2 + trial % 3;
    const Numbers costs = random_numbers(random, 4 + trial % 6, 1, 100);
    Numbers sums(num_parts);
    const int64_t least = least_largest_sum(costs, num_parts, 0, sums);
    const int64_t got = largest_sum(costs, partition_balanced(costs, num_parts, PartSizes::kAny));
    EXPECT_GE(got, least);
    EXPECT_LE(3 * got, 4 * least) << "trial " << trial;
  }
}

TEST(Partition, TheTextbookExampleIsSplitAsTheDifferencingMethodDoes) {
  // {8, 7, 6, 5, 4} in two: differences 1, 1, 4 -> 3, 1 -> 2; sums 16 and 14.
  const Numbers costs = {8, 7, 6, 5, 4};
  EXPECT_EQ(largest_sum(costs, partition_balanced(costs, 2, PartSizes::kAny)), 16);
}

TEST(Partition, ManyItemsBalanceToAFractionOfOne) {
  std::mt19937 random(3);
  const Numbers costs = random_numbers(random, 1000, 1, 1 << 20);
  const int64_t total = std::accumulate(costs.begin(), costs.end(), int64_t{0});
  for (const PartSizes sizes : {PartSizes::kAny, PartSizes::kEqual}) {
    const int64_t largest = largest_sum(costs, partition_balanced(costs, 8, sizes));
    EXPECT_LT(largest - total / 8, 1 << 12);
  }
}

TEST(Partition, BadArgumentsAreNamed) {
  EXPECT_EQ(error_text([] { partition_balanced({}, 0, PartSizes::kAny); }),
            "invalid_argument: num_parts = 0: expected 1 or more");
  const Numbers costs = {1, -2};
  EXPECT_EQ(error_text([&] { partition_balanced(costs, 1, PartSizes::kAny); }),
            "invalid_argument: costs[1] = -2: expected 0 or more");
}

struct Step {
  Numbers lengths, groups;
};

Step random_step(std::mt19937& random, int64_t num_groups, int64_t group_size, int64_t longest) {
  Step step;
  for (int64_t g = 0; g < num_groups; ++g) {
    for (int64_t i = 0; i < group_size; ++i) step.groups.push_back(g);
  }
  step.lengths = random_numbers(random, step.groups.size(), 1, longest);
  return step;
}

TEST(DpPlan, RanksHaveEqualNumbersOfRowsAndNoRowExceedsTheLimit) {
  std::mt19937 random(4);
  for (const int32_t dp_size : {1, 2, 3, 8}) {
    for (const bool whole : {false, true}) {
      for (const int64_t limit : {100, 150, 1000, 100000}) {
        const Step step = random_step(random, 2 * dp_size + 3, 4, 100);
        const std::vector<RankRows> plan = plan_ranks(step.lengths, step.groups,
                                                      {.dp_size = dp_size,
                                                       .max_tokens_per_row = limit,
                                                       .parity_tokens = 50,
                                                       .keeps_groups_whole = whole});
        ASSERT_EQ(plan.size(), static_cast<size_t>(dp_size));
        Parts all;
        std::vector<std::set<int64_t>> groups_of(plan.size());
        for (size_t r = 0; r < plan.size(); ++r) {
          EXPECT_EQ(plan[r].size(), plan[0].size());
          for (const std::vector<int32_t>& row : plan[r]) {
            EXPECT_FALSE(row.empty());
            EXPECT_LE(sum_of(step.lengths, row), limit);
            for (const int32_t s : row) groups_of[r].insert(step.groups[s]);
            all.push_back(row);
          }
        }
        expect_every_item_once(all, step.lengths.size());
        if (!whole) continue;
        size_t num_groups = 0;
        for (const std::set<int64_t>& groups : groups_of) num_groups += groups.size();
        EXPECT_EQ(num_groups, static_cast<size_t>(2 * dp_size + 3));
      }
    }
  }
}

TEST(DpPlan, CostsAreBalancedWhereTokensAreNot) {
  // One sample of 1000 tokens costs as much attention as four of 500: that is how ranks share them.
  const Numbers lengths = {1000, 500, 500, 500, 500}, groups = {0, 1, 2, 3, 4};
  const auto plan =
      plan_ranks(lengths, groups, {.dp_size = 2, .max_tokens_per_row = 2000, .parity_tokens = 0});
  EXPECT_EQ(plan, (std::vector<RankRows>{{{0}}, {{1, 2, 3, 4}}}));
  // Where linear layers dominate, tokens are what counts.
  const auto linear = plan_ranks(
      lengths, groups, {.dp_size = 2, .max_tokens_per_row = 2000, .parity_tokens = 1'000'000});
  for (const RankRows& rows : linear) {
    int64_t tokens = 0;
    for (const std::vector<int32_t>& row : rows) tokens += sum_of(lengths, row);
    EXPECT_EQ(tokens, 1500);
  }
}

TEST(DpPlan, RowsComeCostliestFirst) {
  std::mt19937 random(5);
  const Step step = random_step(random, 20, 2, 90);
  for (const RankRows& rows :
       plan_ranks(step.lengths, step.groups,
                  {.dp_size = 2, .max_tokens_per_row = 120, .parity_tokens = 10})) {
    int64_t before = INT64_MAX;
    for (const std::vector<int32_t>& row : rows) {
      int64_t cost = 0;
      for (const int32_t s : row) cost += sequence_cost(step.lengths[s], 10);
      EXPECT_LE(cost, before);
      before = cost;
    }
  }
}

TEST(DpPlan, ARankWithFewerSamplesThanRowsHasEmptyRowsLast) {
  const auto plan = plan_ranks(Numbers{9, 9, 9}, Numbers{0, 1, 2},
                               {.dp_size = 2, .max_tokens_per_row = 10, .parity_tokens = 1});
  EXPECT_EQ(plan, (std::vector<RankRows>{{{0}, {}}, {{1}, {2}}}));
  const auto nothing = plan_ranks({}, {}, {.dp_size = 2, .max_tokens_per_row = 10});
  EXPECT_EQ(nothing, (std::vector<RankRows>{{}, {}}));
}

TEST(DpPlan, WithoutALimitNumbersOfSamplesDifferByOneAtMost) {
  std::mt19937 random(6);
  const Step step = random_step(random, 11, 3, 500);
  const auto plan = plan_ranks(step.lengths, step.groups, {.dp_size = 4, .parity_tokens = 100});
  for (const RankRows& rows : plan) {
    EXPECT_GE(rows.size(), 8u);
    EXPECT_LE(rows.size(), 9u);
    for (const std::vector<int32_t>& row : rows) EXPECT_EQ(row.size(), 1u);
  }
}

TEST(DpPlan, RealStepsAreBalancedWithinAFewPercent) {
  std::mt19937 random(7);
  std::exponential_distribution<double> tail(1.0 / 400);
  Step step = random_step(random, 64, 8, 1);
  for (int64_t& length : step.lengths) {
    length = std::min<int64_t>(100 + static_cast<int64_t>(tail(random)), 4096);
  }
  for (const bool whole : {false, true}) {
    const auto plan = plan_ranks(step.lengths, step.groups,
                                 {.dp_size = 8,
                                  .max_tokens_per_row = 8192,
                                  .parity_tokens = 4096,
                                  .keeps_groups_whole = whole});
    Numbers costs;
    for (const RankRows& rows : plan) {
      int64_t cost = 0;
      for (const std::vector<int32_t>& row : rows) {
        for (const int32_t s : row) cost += sequence_cost(step.lengths[s], 4096);
      }
      costs.push_back(cost);
    }
    const int64_t mean = std::accumulate(costs.begin(), costs.end(), int64_t{0}) / 8;
    const double imbalance =
        static_cast<double>(*std::ranges::max_element(costs)) / static_cast<double>(mean);
    EXPECT_LT(imbalance, whole ? 1.03 : 1.001);
  }
}

}  // namespace
}  // namespace rollpack::bridge
