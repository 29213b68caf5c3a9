// Groups of head rows: every sample and score is in one, with its row, within the limits.
#include "kernels/cuda/lm_head.h"
#include "tests/kernels/rig.h"

namespace rollpack::kernels::cuda {
namespace {

using testing::Numbers;

TEST(HeadPlan, EveryQueryIsInOneGroupWithItsRow) {
  Numbers numbers(7);
  for (int32_t i = 0; i < 60; ++i) {
    const int32_t num_rows = 1 + numbers.below(700);
    std::vector<int32_t> samples, scores;
    for (int32_t row = 0; row < num_rows; ++row) {  // every row is asked for, some very often
      const int32_t count = numbers.below(200) == 0 ? numbers.below(1500) : 1;
      for (int32_t n = 0; n < std::max(count, 1); ++n) {
        (numbers.below(2) == 0 ? samples : scores).push_back(row);
      }
    }
    std::swap(samples.front(),
              samples[static_cast<size_t>(numbers.below(static_cast<int32_t>(samples.size())))]);
    const HeadPlan plan = plan_head(samples, scores, num_rows);
    ASSERT_EQ(plan.queries.size(), samples.size() + scores.size());
    std::vector<int32_t> seen(plan.queries.size(), 0);
    int32_t next_query = 0;
    for (const HeadGroup& group : plan.groups) {
      ASSERT_EQ(group.first_query, next_query);
      ASSERT_LE(group.num_rows, kGroupRows);
      ASSERT_LE(group.num_queries, kGroupQueries);
      next_query += group.num_queries;
      int32_t last_row = group.first_row;
      for (int32_t q = group.first_query; q < next_query; ++q) {
        const int32_t query = plan.queries[static_cast<size_t>(q)];
        ++seen[static_cast<size_t>(query)];
        const auto index = static_cast<size_t>(query);
        const int32_t row =
            index < samples.size() ? samples[index] : scores[index - samples.size()];
        ASSERT_TRUE(row == last_row || row == last_row + 1);  // none without a query
        last_row = row;
      }
      ASSERT_EQ(last_row, group.first_row + group.num_rows - 1);
    }
    ASSERT_TRUE(std::ranges::all_of(seen, [](int32_t count) { return count == 1; }));
  }
}

TEST(HeadPlan, NoRowsMakeNoGroup) {
  EXPECT_TRUE(plan_head({}, {}, 0).groups.empty());
}

}  // namespace
}  // namespace rollpack::kernels::cuda
