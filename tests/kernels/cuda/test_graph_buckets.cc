// Which steps are graphs, without a device.
#include "kernels/cuda/graph_buckets.h"

#include "kernels/cuda/linear.h"
#include "tests/kernels/rig.h"

namespace rollpack::kernels::cuda {
namespace {

using testing::add_sequence;

TEST(GraphBuckets, AscendInStepsThatGrowAndEndAtTheMostRows) {
  EXPECT_EQ(graph_buckets(100),
            (std::vector<int32_t>{1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100}));
  EXPECT_EQ(graph_buckets(1), std::vector<int32_t>{1});
  EXPECT_TRUE(graph_buckets(0).empty());
  EXPECT_EQ(graph_buckets(256).size(), 23U);
  EXPECT_EQ(graph_buckets(512).size(), 31U);
  EXPECT_EQ(graph_buckets(100000), graph_buckets(512));
}

TEST(GraphBuckets, ThoseOfABackendEndAtTheRowsThatItsStepsMayDecode) {
  EXPECT_EQ(graph_buckets(BackendOptions{.max_num_seqs = 100}), graph_buckets(100));
  EXPECT_EQ(graph_buckets(BackendOptions{.max_num_seqs = 100, .max_num_batched_tokens = 20}),
            graph_buckets(20));
  EXPECT_TRUE(graph_buckets(BackendOptions{.enforce_eager = true}).empty());
}

TEST(GraphBuckets, EveryNumberOfRowsGoesToTheSmallestThatHasThem) {
  const std::vector<int32_t> buckets = graph_buckets(300);
  for (int32_t rows = 1; rows <= 300; ++rows) {
    const int32_t bucket = bucket_for(buckets, rows);
    EXPECT_GE(bucket, rows);
    const auto at = std::ranges::find(buckets, bucket);
    ASSERT_NE(at, buckets.end());
    if (at != buckets.begin()) {
      EXPECT_LT(*(at - 1), rows);
    }
    const int64_t tile = tokens_per_tile(DType::kBF16, rows);
    const int64_t bucket_tile = tokens_per_tile(DType::kBF16, bucket);
    EXPECT_EQ(tiles_of(rows, tile), tiles_of(bucket, bucket_tile)) << rows << " of " << bucket;
  }
  EXPECT_EQ(bucket_for(buckets, 301), 0);
  EXPECT_EQ(bucket_for(buckets, 0), 0);
  EXPECT_EQ(bucket_for({}, 1), 0);
}

StepPlan decoding(int32_t rows) {
  StepPlan plan;
  for (int32_t row = 0; row < rows; ++row) {
    add_sequence(plan, {5}, 20 * row, testing::page_range(0, 2 * row + 1), row);
    plan.samples.push_back({row, row});
  }
  return plan;
}

TEST(GraphBuckets, OnlyStepsThatDrawOnceFromARowOfEverySequenceAreGraphs) {
  EXPECT_TRUE(is_pure_decoding(decoding(1)));
  StepPlan plan = decoding(3);
  std::swap(plan.samples[0], plan.samples[2]);
  plan.slot_inits = {{.slot = 0}};
  plan.page_copies = {{0, 1, 2}};
  EXPECT_TRUE(is_pure_decoding(plan));

  EXPECT_FALSE(is_pure_decoding({}));
  plan = decoding(3);
  plan.scores = {{0, 1}};
  EXPECT_FALSE(is_pure_decoding(plan)) << "a score";
  plan = decoding(3);
  plan.samples.pop_back();
  EXPECT_FALSE(is_pure_decoding(plan)) << "a row that nothing is drawn from";
  plan = decoding(3);
  plan.samples[2] = {1, 2};
  EXPECT_FALSE(is_pure_decoding(plan)) << "two draws from a row";
  plan = decoding(3);
  plan.positions[1] = kPadPosition;
  EXPECT_FALSE(is_pure_decoding(plan)) << "a pad";
  plan = decoding(3);
  plan.samples[1].row = 9;
  EXPECT_FALSE(is_pure_decoding(plan)) << "no such row";
  plan = decoding(1);
  add_sequence(plan, {7, 8}, 3, {1}, 1);
  plan.samples.insert(plan.samples.end(), {{1, 1}, {2, 1}});
  EXPECT_FALSE(is_pure_decoding(plan)) << "a draft";
}

// Shape of Qwen2.5-0.5B.
TEST(GraphBuckets, KernelsOfAStepAreThoseOfItsLayersAndOfTheHeadsGroups) {
  constexpr ModelShape kSmall = {
      .D = 896, .H = 14, .G = 2, .K = 64, .F = 4864, .V = 151936, .L = 24};
  EXPECT_EQ(step_launches(kSmall, 256), 24 * 8 + 9);
  EXPECT_EQ(step_launches(kSmall, 257), 24 * 8 + 14);
}

}  // namespace
}  // namespace rollpack::kernels::cuda
