// What counts of a journal, record by record.
#include "rollout/journal/live_set.h"

#include <gtest/gtest.h>

#include <functional>

#include "kernels/base/error.h"
#include "tests/rollout/journal/made_records.h"

namespace rollpack::rollout {
namespace {

using testing::encoded;
using testing::made_batch;
using testing::made_group;
using testing::made_records;
using testing::made_request;

bool is_refused(LiveSet& live, const Record& record) {
  const std::string before = encoded(live);
  try {
    live.apply(record);
  } catch (const Error& error) {
    EXPECT_EQ(error.info.code, ErrorCode::kDataLoss);
    EXPECT_EQ(encoded(live), before) << "what is refused changes nothing";
    return true;
  }
  return false;
}

TEST(LiveSet, AGroupLivesUntilItsLastSampleIsReleased) {
  LiveSet live;
  live.apply(made_request(4, 2, 3));
  EXPECT_EQ(live.num_groups(), 2);
  bridge::FormedBatch left{
      .batch_seq = 8, .step = 1, .dp_rank = 0, .dp_size = 2, .row_starts = {0, 2}};
  left.samples = {{4, 0, 0}, {4, 0, 2}};
  bridge::FormedBatch right = left;
  right.batch_seq = 9;
  right.dp_rank = 1;
  right.samples = {{4, 0, 1}};
  right.row_starts = {0, 1};
  live.apply(record::Formed{{left, right}});
  live.apply(record::Released{8});
  EXPECT_EQ(live.num_groups(), 2);
  const RestoredRequests requests = live.requests();
  EXPECT_EQ(requests.groups[0].is_done, (std::vector<bool>{true, false, true}));
  EXPECT_EQ(requests.groups[1].is_done, (std::vector<bool>{false, false, false}));
  EXPECT_EQ(requests.num_requests, 5);
  const bridge::RestoredDelivery delivery = live.delivery();
  ASSERT_EQ(delivery.unformed.size(), 1u);
  EXPECT_EQ(delivery.unformed[0].prompt_indices, std::vector<int32_t>{1});
  EXPECT_EQ(delivery.batches.size(), 1u);
  EXPECT_EQ(delivery.num_steps, 1u);
  live.apply(record::Released{9});
  EXPECT_EQ(live.num_groups(), 1);
  EXPECT_EQ(live.delivery().last_batch_seq, 9u);
}

TEST(LiveSet, AnAbortIsOfWhatIsInNoBatchYet) {
  LiveSet live;
  live.apply(made_request(0, 2, 2));
  live.apply(made_request(1, 1, 2));
  bridge::FormedBatch cut = made_batch(1, 0, 0, 2);
  cut.samples[1].num_tokens = 3;
  live.apply(record::Formed{{cut}});
  live.apply(record::Aborted{0});
  const RestoredRequests requests = live.requests();
  EXPECT_FALSE(requests.groups[0].is_aborted);
  EXPECT_EQ(requests.groups[0].cut_lengths, (std::map<int32_t, int32_t>{{1, 3}}));
  EXPECT_TRUE(requests.groups[1].is_aborted);
  EXPECT_FALSE(requests.groups[2].is_aborted);
  live.apply(record::Aborted{});
  EXPECT_TRUE(live.requests().groups[2].is_aborted);
}

TEST(LiveSet, AFailureOfABatchIsNotTriedAgain) {
  LiveSet live;
  live.apply(made_request(0, 1, 2));
  bridge::FormedBatch batch = made_batch(1, 0, 0, 1);
  batch.failed.push_back({.key = made_group(0, 0, 2).request.key, .error = {.value = "NaN"}});
  batch.failed[0].key.sample_index = 1;
  live.apply(record::Formed{{batch}});
  EXPECT_EQ(live.requests().groups[0].is_done, (std::vector<bool>{false, true}));
  EXPECT_EQ(live.delivery().batches[0].failed[0].error.value, "NaN");
}

TEST(LiveSet, WhatContradictsWhatWasBeforeIsRefused) {
  LiveSet live;
  live.apply(made_request(0, 2, 2));
  live.apply(record::Formed{{made_batch(1, 0, 0, 2)}});
  EXPECT_TRUE(is_refused(live, record::Header{}));
  EXPECT_TRUE(is_refused(live, made_request(0, 1, 2))) << "the same group twice";
  EXPECT_TRUE(is_refused(live, record::Released{2}));
  EXPECT_TRUE(is_refused(live, record::Formed{{made_batch(1, 0, 1, 2)}})) << "a number twice";
  EXPECT_TRUE(is_refused(live, record::Formed{{made_batch(2, 0, 0, 2)}})) << "samples twice";
  EXPECT_TRUE(is_refused(live, record::Formed{{made_batch(2, 0, 1, 3)}})) << "beyond the group";
  EXPECT_TRUE(is_refused(live, record::Formed{{made_batch(2, 5, 0, 1)}})) << "of nobody";
  EXPECT_TRUE(is_refused(live, record::Formed{{made_batch(2, 0, 1, 1), made_batch(3, 0, 1, 1)}}));
  bridge::FormedBatch share = made_batch(2, 0, 1, 2);
  share.step = 1;
  share.dp_rank = 0;
  share.row_starts = {0, 3};
  EXPECT_TRUE(is_refused(live, record::Formed{{share}})) << "rows of more samples than it has";
  record::Accepted other = made_request(1, 1, 2);
  other.groups[0].accepted.request.key.request_id = 2;
  EXPECT_TRUE(is_refused(live, other));
  EXPECT_FALSE(is_refused(live, record::Formed{{made_batch(2, 0, 1, 2)}}));
}

TEST(LiveSet, EveryNodesBridgeCountsForItself) {
  LiveSet live;
  live.apply(made_request(0, 1, 2));
  live.apply(record::NodeAccepted{2, made_request(1, 2, 2)});
  live.apply(record::Formed{{made_batch(1, 0, 0, 2)}});
  live.apply(record::Formed{{made_batch(record::at_node(2, 1), 1, 0, 2)}});
  EXPECT_TRUE(is_refused(live, record::Formed{{made_batch(2, 1, 1, 2)}})) << "not node 0's group";
  EXPECT_TRUE(is_refused(live, record::Released{record::at_node(1, 1)}));
  EXPECT_TRUE(is_refused(live, record::NodeAccepted{0, made_request(2, 1, 2)}));
  EXPECT_EQ(live.last_node(), 2);
  EXPECT_EQ(live.requests().groups.back().accepted.request.key.node, 2);
  EXPECT_EQ(live.delivery(0).last_batch_seq, 1u);
  EXPECT_TRUE(live.delivery(0).unformed.empty());
  const bridge::RestoredDelivery of_node = live.delivery(2);
  EXPECT_EQ(of_node.last_batch_seq, 1u);
  ASSERT_EQ(of_node.batches.size(), 1u);
  EXPECT_EQ(of_node.batches[0].batch_seq, 1u);
  EXPECT_EQ(of_node.batches[0].samples[0].request_id, 1);
  ASSERT_EQ(of_node.unformed.size(), 1u);
  EXPECT_EQ(of_node.unformed[0].prompt_indices, std::vector<int32_t>{1});
  EXPECT_TRUE(live.delivery(1).batches.empty());
  LiveSet again;
  for (Record& each : live.records()) again.apply(std::move(each));
  EXPECT_EQ(encoded(again), encoded(live));
  EXPECT_EQ(again.num_bytes(), live.num_bytes());
  live.apply(record::Released{record::at_node(2, 1)});
  EXPECT_EQ(live.delivery(2).last_batch_seq, 1u) << "is not given out again";
}

TEST(LiveSet, ItsRecordsMakeItAgain) {
  LiveSet live;
  for (const Record& record : made_records(60)) {
    live.apply(record);
    LiveSet again;
    int64_t num_bytes = 0;
    for (Record& each : live.records()) {
      num_bytes += static_cast<int64_t>(encode(each).size());
      again.apply(std::move(each));
    }
    ASSERT_EQ(encoded(again), encoded(live));
    EXPECT_EQ(again.num_bytes(), live.num_bytes());
    EXPECT_LE(num_bytes, live.num_bytes() + 200);
  }
}

}  // namespace
}  // namespace rollpack::rollout
