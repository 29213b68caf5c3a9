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
  while (const auto key = ledger.next(0)) {
    order.push_back(*key);
    ledger.assign(*key, 0);
  }
  EXPECT_EQ(order, (std::vector<Ledger::GroupKey>{{0, 1}, {0, 0}, {1, 0}}));
}

TEST(Ledger, AWorkerTakesWhatItsOwnNodeAskedForFirstAndThenHelpsOthers) {
  Ledger ledger;
  ledger.accept(group(0, 0, 9), "");
  GroupRequest of_node_1 = group(1, 0, 5);
  of_node_1.key.node = 1;
  ledger.accept(of_node_1, "");
  EXPECT_EQ(ledger.open_requests(1), std::vector<int64_t>{1});
  EXPECT_EQ(ledger.next(2), (Ledger::GroupKey{0, 0})) << "nothing of its own: the oldest";
  ASSERT_EQ(ledger.next(1), (Ledger::GroupKey{1, 0}));
  ledger.assign({1, 0}, 0);
  EXPECT_EQ(ledger.num_queued_groups(), 1);
  EXPECT_EQ(ledger.next(1), (Ledger::GroupKey{0, 0}));
}

TEST(Ledger, TakesGroupsAsSubmittedWhereLongestFirstIsOff) {
  Ledger ledger;
  ledger.set_longest_first(false);
  for (const int32_t index : {0, 1, 2}) ledger.accept(group(0, index, 5 + index), "");
  for (const int32_t index : {0, 1, 2}) {
    ASSERT_EQ(ledger.next(0), (Ledger::GroupKey{0, index}));
    ledger.assign({0, index}, 0);
  }
}

TEST(Ledger, CountsEachSampleOnceAndOnlyFromItsWorker) {
  Ledger ledger;
  ledger.accept(group(0, 0, 5), "here");
  bridge::SampleKey key = ledger.assign({0, 0}, 3).key;
  key.sample_index = 1;
  EXPECT_FALSE(ledger.commit(key, 2, 1)) << "another worker's";
  EXPECT_EQ(ledger.commit(key, 3, 1), 10);
  EXPECT_FALSE(ledger.commit(key, 3, 1)) << "a second time";
  EXPECT_EQ(ledger.live_origin("0"), "here");
  key.sample_index = 2;
  EXPECT_FALSE(ledger.commit(key, 3, 1)) << "beyond the group";
  key.sample_index = 0;
  EXPECT_EQ(ledger.commit(key, 3, 1), 15) << "the last one takes the prompt along";
  EXPECT_FALSE(ledger.commit(key, 3, 1)) << "late";
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
  EXPECT_EQ(ledger.abort(1).size(), 1u);
  EXPECT_EQ(ledger.num_open_samples(1), 2);
  EXPECT_EQ(ledger.num_open_samples(), 4);
  EXPECT_EQ(ledger.abort(std::nullopt).size(), 1u);
}

TEST(Ledger, CountsTheSamplesThatAreQueued) {
  Ledger ledger;
  for (const int32_t index : {0, 1}) ledger.accept(group(0, index, 5, 3), "");
  EXPECT_EQ(ledger.num_queued_samples(), 6);
  bridge::SampleKey key = ledger.assign({0, 0}, 7).key;
  EXPECT_EQ(ledger.num_queued_samples(), 3);
  ledger.commit(key, 7, 1);
  ledger.fence(7);  // two of it are still open
  EXPECT_EQ(ledger.num_queued_samples(), 5);
  ledger.assign({0, 0}, 7);
  ledger.fence(7);  // a suspect by now, and queued all the same
  EXPECT_EQ(ledger.num_queued_samples(), 5);
  ledger.assign({0, 1}, 8);
  ledger.abort(std::nullopt);
  EXPECT_EQ(ledger.num_queued_samples(), 0);
  EXPECT_EQ(ledger.num_open_samples(), 3);
}

TEST(Ledger, FencesTheAttemptOfALostWorkerAndQueuesWhatIsOpen) {
  Ledger ledger;
  ledger.accept(group(0, 0, 5, 3), "here");
  const GroupRequest once = ledger.assign({0, 0}, 1);
  EXPECT_EQ(once.attempt, 1);
  bridge::SampleKey first = once.key;
  first.sample_index = 1;
  EXPECT_EQ(ledger.commit(first, 1, 1), 10);

  EXPECT_EQ(ledger.fence(1).num_requeued, 1);
  EXPECT_EQ(ledger.num_queued_groups(), 1);
  EXPECT_EQ(ledger.expected_tokens({0, 0}), 25) << "the prompt and two of three samples";
  const GroupRequest again = ledger.assign({0, 0}, 1);
  EXPECT_EQ(again.attempt, 2);
  EXPECT_EQ(again.sample_indices, (std::vector<int32_t>{0, 2}));

  first.sample_index = 0;
  EXPECT_FALSE(ledger.commit(first, 1, 1))
      << "of the fenced attempt, though the worker has its number";
  bridge::SampleKey second = again.key;
  second.sample_index = 1;
  EXPECT_FALSE(ledger.commit(second, 1, 2)) << "done before";
  second.sample_index = 0;
  EXPECT_TRUE(ledger.commit(second, 1, 2));
  second.sample_index = 2;
  EXPECT_EQ(ledger.commit(second, 1, 2), 15);
  EXPECT_EQ(ledger.num_dropped(), 2);
  EXPECT_EQ(ledger.num_open_samples(), 0);
  EXPECT_FALSE(ledger.live_origin("0"));
}

TEST(Ledger, SuspectsAfterTwoDeathsAndConvictsAtTheThird) {
  Ledger ledger;
  ledger.accept(group(0, 0, 5), "");
  ledger.accept(group(0, 1, 4), "");
  for (const int32_t worker : {1, 2}) {
    ASSERT_EQ(ledger.next(0), (Ledger::GroupKey{0, 0}));
    ledger.assign({0, 0}, worker);
    EXPECT_EQ(ledger.fence(worker).num_requeued, 1);
  }
  EXPECT_EQ(ledger.next(0), (Ledger::GroupKey{0, 1})) << "a suspect is handed out by itself";
  EXPECT_EQ(ledger.next_suspect(), (Ledger::GroupKey{0, 0}));
  EXPECT_EQ(ledger.num_queued_groups(), 2);
  ledger.assign({0, 0}, 3);
  const Ledger::Fenced fenced = ledger.fence(3);
  EXPECT_EQ(fenced.num_requeued, 0);
  ASSERT_EQ(fenced.culprits.size(), 1u);
  EXPECT_EQ(fenced.culprits[0].num_samples(), 2);
  EXPECT_FALSE(ledger.next_suspect());
  EXPECT_EQ(ledger.num_open_samples(), 2);
}

TEST(Ledger, WhatMustFinishOutlivesAnAbortAndIsQueuedAgain) {
  Ledger ledger;
  ledger.accept(group(0, 0, 5, 4), "", {.is_done = {false, true}, .must_finish = true});
  EXPECT_EQ(ledger.num_open_samples(), 3);
  EXPECT_TRUE(ledger.abort(std::nullopt).empty());
  const GroupRequest once = ledger.assign({0, 0}, 1);
  EXPECT_EQ(once.sample_indices, (std::vector<int32_t>{0, 2, 3}));
  bridge::SampleKey key = once.key;
  key.sample_index = 2;
  EXPECT_EQ(ledger.give_back(key, 1, 1), 10);
  EXPECT_FALSE(ledger.give_back(key, 1, 1)) << "a second time";
  EXPECT_FALSE(ledger.commit(key, 1, 1)) << "the attempt has given it up";
  key.sample_index = 0;
  EXPECT_EQ(ledger.commit(key, 1, 1), 10);
  EXPECT_FALSE(ledger.next(0)) << "the worker has one more";
  key.sample_index = 3;
  EXPECT_EQ(ledger.give_back(key, 1, 1), 15) << "the prompt is off its hands too";
  ASSERT_TRUE(ledger.next(0));
  const GroupRequest again = ledger.assign({0, 0}, 2);
  EXPECT_EQ(again.sample_indices, (std::vector<int32_t>{2, 3}));
  EXPECT_EQ(again.attempt, 2);
  EXPECT_EQ(ledger.fence(2).num_requeued, 1);
  EXPECT_EQ(ledger.num_open_samples(), 2);
}

TEST(Ledger, WhatNeedNotFinishIsNotGivenBack) {
  Ledger ledger;
  ledger.accept(group(0, 0, 5, 1), "");
  bridge::SampleKey key = ledger.assign({0, 0}, 1).key;
  key.sample_index = 0;
  EXPECT_FALSE(ledger.give_back(key, 1, 1));
  EXPECT_TRUE(ledger.commit(key, 1, 1));
}

TEST(Ledger, DoesNotRunAbortedGroupsAgain) {
  Ledger ledger;
  ledger.accept(group(0, 0, 5), "");
  bridge::SampleKey key = ledger.assign({0, 0}, 1).key;
  EXPECT_TRUE(ledger.abort(0).empty()) << "the worker hands it back";
  key.sample_index = 1;
  EXPECT_TRUE(ledger.commit(key, 1, 1));
  const Ledger::Fenced fenced = ledger.fence(1);
  ASSERT_EQ(fenced.aborted.size(), 1u);
  EXPECT_EQ(fenced.aborted[0].sample_indices, std::vector<int32_t>{0});
  EXPECT_EQ(ledger.num_open_samples(), 0);
}

}  // namespace
}  // namespace rollpack::rollout
