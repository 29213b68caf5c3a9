// What a call may ask of the groups it gets: their order, how many must be ready, how stale they
// may be; and what it is told of them.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/trainer_bridge/delivery/made_samples.h"
#include "trainer_bridge/delivery/delivery.h"

namespace rollpack::bridge {
namespace {

using namespace testing;

class OrderTest : public ::testing::Test {
 protected:
  OrderTest() : layout(make_layout({})), slots(8, 1 << 16), delivery(slots, *layout) {}

  void commit_group(int64_t request, int32_t prompt, int64_t version = 0) {
    for (int32_t i = 0; i < 2; ++i) {
      delivery.commit(sample_of(request, prompt, i, 2, 4, version));
    }
  }

  // Number of groups of the batch, 0 where none came.
  int64_t take(const BatchWish& wish) {
    const auto notice = delivery.next_batch(kAnna, wish);
    if (!notice) return 0;
    last = *notice;
    if (notice->lease) delivery.release(kAnna, *notice->lease, notice->batch_seq);
    return notice->num_groups;
  }

  std::unique_ptr<BatchLayout> layout;
  SlotRing slots;
  Delivery delivery;
  BatchNotice last;
};

BatchWish canonical(std::optional<int64_t> num_groups) {
  return {.num_groups = num_groups, .order = GroupOrder::kCanonical};
}

TEST_F(OrderTest, CanonicalOrderWaitsForTheLowestPromptOfTheLowestRequest) {
  delivery.expect(1, 3);
  delivery.expect(2, 2);
  commit_group(2, 0);
  commit_group(1, 2);
  commit_group(1, 1);
  EXPECT_EQ(take(canonical(1)), 0);
  EXPECT_EQ(take(canonical(std::nullopt)), 0);
  commit_group(1, 0);
  EXPECT_EQ(take(canonical(5)), 0);
  EXPECT_EQ(take(canonical(2)), 2);
  EXPECT_EQ(take(canonical(std::nullopt)), 2);  // prompt 2 of request 1, prompt 0 of request 2
  EXPECT_EQ(take(canonical(1)), 0);
  commit_group(2, 1);
  EXPECT_EQ(take(canonical(1)), 1);
  EXPECT_EQ(delivery.num_held_samples(), 0);
}

TEST_F(OrderTest, WhatCompletionOrderTookIsNotWaitedFor) {
  delivery.expect(1, 3);
  commit_group(1, 1);
  EXPECT_EQ(take({}), 1);
  commit_group(1, 2);
  EXPECT_EQ(take(canonical(1)), 0);
  commit_group(1, 0);
  EXPECT_EQ(take(canonical(2)), 2);
}

TEST_F(OrderTest, AGroupThatNobodyAnnouncedCountsFromItsFirstSample) {
  delivery.commit(sample_of(1, 0, 0, 2, 4));
  commit_group(1, 1);
  EXPECT_EQ(take(canonical(1)), 0);
  delivery.commit(sample_of(1, 0, 1, 2, 4));
  EXPECT_EQ(take(canonical(2)), 2);
}

TEST_F(OrderTest, MinReadyIsWaitedForAndNumGroupsIsNotExceeded) {
  commit_group(1, 0);
  EXPECT_EQ(take({.min_ready = 2}), 0);
  EXPECT_EQ(take({.num_groups = 4, .min_ready = 2}), 0);
  commit_group(1, 1);
  commit_group(1, 2);
  EXPECT_EQ(take({.num_groups = 4}), 0);
  EXPECT_EQ(take({.num_groups = 2, .min_ready = 1}), 2);
  EXPECT_EQ(take({.num_groups = 4, .min_ready = 1}), 1);
}

TEST_F(OrderTest, CompleteGroupsHaveNoFailedAndNoAbortedSample) {
  commit_group(1, 0);
  delivery.commit(sample_of(1, 1, 0, 2, 4));
  delivery.fail(failure_of(1, 1, 1, 2));
  Sample aborted = sample_of(1, 2, 0, 2, 4);
  aborted.finish_reason = FinishReason::kAbort;
  delivery.commit(aborted);
  delivery.commit(sample_of(1, 2, 1, 2, 4));
  EXPECT_EQ(take({}), 3);
  EXPECT_EQ(last.num_complete_groups, 1);
  EXPECT_EQ(last.num_samples, 5);
}

TEST_F(OrderTest, StaleSamplesBecomeFailuresThatSayHowStale) {
  int64_t current = 7;
  delivery.configure({.max_version_lag = 2, .weight_version = [&] { return current; }});
  commit_group(1, 0, 5);
  delivery.commit(sample_of(1, 1, 0, 2, 4, 4));
  delivery.commit(sample_of(1, 1, 1, 2, 0, 4));  // without a token nothing of it is stale
  EXPECT_EQ(take({.num_groups = 2}), 2);
  EXPECT_EQ(last.num_samples, 3);
  EXPECT_EQ(last.version_lag, 2);
  EXPECT_EQ(last.num_complete_groups, 1);
  ASSERT_EQ(last.failed.size(), 1u);
  EXPECT_EQ(last.failed[0].key.prompt_index, 1);
  EXPECT_EQ(format_error(last.failed[0].error),
            "weight_version = 4 (bridge.max_version_lag): expected 5 or later, 2 behind the "
            "current 7; the sample is too stale to train on");
  // A sample that spans versions is as stale as its oldest token.
  Sample spanning = sample_of(1, 2, 0, 1, 4, 4);
  spanning.weight_versions.push_back({2, 7});
  delivery.commit(spanning);
  EXPECT_EQ(take({}), 1);
  EXPECT_EQ(last.num_samples, 0);
  EXPECT_FALSE(last.lease);
  for (const auto& [name, value] : delivery.stats()) {
    if (name == "num_stale_samples") {
      EXPECT_EQ(value, 2);
    }
  }
}

TEST_F(OrderTest, WithoutABoundTheLagIsOnlyReported) {
  delivery.configure({.weight_version = [] { return int64_t{100}; }});
  commit_group(1, 0, 3);
  EXPECT_EQ(take({}), 1);
  EXPECT_EQ(last.version_lag, 97);
  EXPECT_EQ(last.num_samples, 2);
}

}  // namespace
}  // namespace rollpack::bridge
