#include "rollout/node_bridge/kept_store.h"

#include <gtest/gtest.h>

#include "tests/rollout/cluster/thread_ranks.h"

namespace rollpack::rollout {
namespace {

constexpr int32_t kWorker = 5, kOther = 6;

bridge::Sample sample_of(int32_t index, std::vector<int32_t> response = {1, 2}) {
  return {.key = {.request_id = 3,
                  .prompt_id = {.text = "p"},
                  .sample_index = index,
                  .group_size = 8,
                  .node = 1},
          .response_ids = std::move(response),
          .finish_reason = bridge::FinishReason::kLength};
}

class KeptStoreTest : public ::testing::Test {
 protected:
  void decide(int32_t index, int32_t attempt, Verdict verdict, int32_t worker = kWorker) {
    store.decide(worker, sample_of(index).key, attempt, verdict);
  }

  KeepingSink sink;
  KeptStore store{sink};
};

TEST_F(KeptStoreTest, ASampleWaitsForItsVerdict) {
  store.keep(kWorker, 1, sample_of(0));
  EXPECT_TRUE(sink.samples().empty());
  decide(0, 1, Verdict::kCommit);
  EXPECT_EQ(sink.samples().size(), 1u);
  EXPECT_EQ(store.num_samples(), 0);
}

TEST_F(KeptStoreTest, AVerdictWaitsForItsSample) {
  decide(0, 1, Verdict::kCommitAsAborted);
  decide(1, 1, Verdict::kDrop);
  store.keep(kWorker, 1, sample_of(0));
  store.keep(kWorker, 1, sample_of(1));
  ASSERT_EQ(sink.samples().size(), 1u);
  EXPECT_EQ(sink.samples().begin()->second.finish_reason, bridge::FinishReason::kAbort);
  EXPECT_EQ(store.num_dropped(), 1);
}

TEST_F(KeptStoreTest, AVerdictIsAboutOneAttempt) {
  store.keep(kWorker, 1, sample_of(0, {9}));
  store.keep(kOther, 2, sample_of(0, {7}));
  decide(0, 1, Verdict::kDrop);
  decide(0, 2, Verdict::kCommit, kOther);
  ASSERT_EQ(sink.samples().size(), 1u);
  EXPECT_EQ(sink.samples().begin()->second.response_ids, std::vector<int32_t>{7});
}

TEST_F(KeptStoreTest, WhatALostRankLeftIsDroppedAndWhatCountsStaysUntilItHasCome) {
  store.keep(kWorker, 1, sample_of(0));
  store.keep(kOther, 1, sample_of(1));
  decide(2, 1, Verdict::kCommit);
  store.forget(kWorker);
  EXPECT_EQ(store.num_samples(), 1) << "of the other rank";
  store.keep(kWorker, 1, sample_of(2));  // was under way in the socket
  store.keep(kWorker, 1, sample_of(3));  // nobody will decide about it
  EXPECT_EQ(sink.samples().size(), 1u);
  EXPECT_EQ(store.num_samples(), 1);
  EXPECT_EQ(store.num_dropped(), 2);
}

TEST_F(KeptStoreTest, WhatCountsAndNeverCameFails) {
  decide(0, 1, Verdict::kCommit);
  decide(1, 1, Verdict::kDrop);
  store.begin(kWorker);
  store.end(kWorker);
  decide(2, 1, Verdict::kCommit);
  decide(3, 1, Verdict::kDrop);
  ASSERT_EQ(sink.failed().size(), 2u);
  EXPECT_EQ(sink.failed()[0].error.code, ErrorCode::kDataLoss);
  EXPECT_EQ(sink.failed()[0].key.sample_index, 0);
  EXPECT_EQ(sink.failed()[1].key.sample_index, 2);
}

// A rank of another node may have closed its link and opened one more.
TEST_F(KeptStoreTest, ARankHasEndedWithItsLastConnection) {
  store.begin(kWorker);
  store.begin(kWorker);
  store.end(kWorker);
  decide(0, 1, Verdict::kCommit);
  store.keep(kWorker, 1, sample_of(0));
  EXPECT_EQ(sink.samples().size(), 1u);
  store.end(kWorker);
  store.begin(kWorker);
  decide(1, 1, Verdict::kCommit);
  store.keep(kWorker, 1, sample_of(1));
  EXPECT_EQ(sink.samples().size(), 2u);
  EXPECT_TRUE(sink.failed().empty());
}

}  // namespace
}  // namespace rollpack::rollout
