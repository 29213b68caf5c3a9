#include "rollout/cluster/ledger.h"

#include <gtest/gtest.h>

namespace rollpack::rollout {
namespace {

GroupRequest group(int64_t request_id, int32_t prompt_index, int32_t length, int32_t n = 2) {
  GroupRequest request;
  request.key = {.request_id = request_id,
                 .prompt_index = prompt_index,
                 .prompt_id = {.text = std::to_string(prompt_index)},
                 .group_size = n};
  request.prompt_ids = std::make_shared<const std::vector<int32_t>>(length, 1);
  request.sampling.response_length = 10;
  return request;
}

TEST(Ledger, TakesTheOldestSubmitsLongestGroupFirst) {
  Ledger ledger;
  ledger.accept(group(0, 0, 5), "");
  ledger.accept(group(0, 1, 9), "");
  ledger.accept(group(1, 0, 90), "");
  std::vector<Ledger::GroupKey> order;
  while (const auto key = ledger.next()) {
    order.push_back(*key);
    ledger.assign(*key, 0);
  }
  EXPECT_EQ(order, (std::vector<Ledger::GroupKey>{{0, 1}, {0, 0}, {1, 0}}));
}

TEST(Ledger, TakesGroupsAsSubmittedWhereLongestFirstIsOff) {
  Ledger ledger;
  ledger.set_longest_first(false);
  for (const int32_t index : {0, 1, 2}) ledger.accept(group(0, index, 5 + index), "");
  for (const int32_t index : {0, 1, 2}) {
    ASSERT_EQ(ledger.next(), (Ledger::GroupKey{0, index}));
    ledger.assign({0, index}, 0);
  }
}

TEST(Ledger, CountsEachSampleOnceAndOnlyFromItsWorker) {
  Ledger ledger;
  ledger.accept(group(0, 0, 5), "here");
  bridge::SampleKey key = ledger.assign({0, 0}, 3).key;
  key.sample_index = 1;
  EXPECT_FALSE(ledger.commit(key, 2)) << "another worker's";
  EXPECT_EQ(ledger.commit(key, 3), 10);
  EXPECT_FALSE(ledger.commit(key, 3)) << "a second time";
  EXPECT_EQ(ledger.live_origin("0"), "here");
  key.sample_index = 2;
  EXPECT_FALSE(ledger.commit(key, 3)) << "beyond the group";
  key.sample_index = 0;
  EXPECT_EQ(ledger.commit(key, 3), 15) << "the last one takes the prompt along";
  EXPECT_FALSE(ledger.commit(key, 3)) << "late";
  EXPECT_EQ(ledger.num_open_samples(), 0);
  EXPECT_EQ(ledger.num_dropped(), 4);
  EXPECT_FALSE(ledger.live_origin("0"));
}

TEST(Ledger, GivesBackQueuedGroupsOfOneSubmit) {
  Ledger ledger;
  ledger.accept(group(0, 0, 5), "");
  ledger.accept(group(1, 0, 5), "");
  ledger.accept(group(1, 1, 5), "");
  ledger.assign({1, 1}, 0);
  EXPECT_EQ(ledger.take_queued(1).size(), 1u);
  EXPECT_EQ(ledger.num_open_samples(1), 2);
  EXPECT_EQ(ledger.num_open_samples(), 4);
  EXPECT_EQ(ledger.take_queued(std::nullopt).size(), 1u);
}

}  // namespace
}  // namespace rollpack::rollout
