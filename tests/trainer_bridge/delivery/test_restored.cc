// Delivery that goes on from its log: batches of a life before, the same again.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "tests/error_text.h"
#include "tests/trainer_bridge/delivery/made_samples.h"
#include "trainer_bridge/delivery/delivery.h"

namespace rollpack::bridge {
namespace {

using namespace testing;
using rollpack::testing::error_text;

// Everything at once on a disk that outlives the deliveries.
class KeptLog : public DeliveryLog {
 public:
  void formed(std::vector<FormedBatch> batches) override {
    for (FormedBatch& batch : batches) {
      restored.last_batch_seq = std::max(restored.last_batch_seq, batch.batch_seq);
      restored.num_steps = std::max(restored.num_steps, batch.step);
      restored.batches.push_back(std::move(batch));
    }
  }
  void released(uint64_t batch_seq) override {
    EXPECT_EQ(std::erase_if(restored.batches,
                            [&](const FormedBatch& b) { return b.batch_seq == batch_seq; }),
              1u);
  }
  void when_durable(std::function<void(std::optional<ErrorInfo>)> done) override { done({}); }

  RestoredDelivery restored;
};

struct Life {
  explicit Life(KeptLog& log, int64_t slot_bytes = 1 << 14, int32_t num_slots = 4)
      : layout(make_layout({.max_tokens_per_row = 64})),
        slots(num_slots, slot_bytes),
        delivery(slots, *layout) {
    delivery.configure({.attention_parity_tokens = 16});
    delivery.restore(log, log.restored);
  }
  void commit_groups(int32_t first, int32_t end) {
    for (int32_t p = first; p < end; ++p) {
      for (int32_t i = 0; i < 4; ++i) {
        delivery.commit(sample_of(1, p, i, 4, 1 + (p * 13 + i * 29) % 40));
      }
    }
  }
  std::optional<BatchNotice> next_batch(uint64_t client, std::optional<int64_t> num = {}) {
    return delivery.next_batch(client, {.num_groups = num});
  }
  void release(uint64_t client, const BatchNotice& notice) {
    delivery.release(client, notice.lease, notice.batch_seq);
  }

  std::unique_ptr<BatchLayout> layout;
  SlotRing slots;
  Delivery delivery;
};

TEST(RestoredDelivery, ABatchThatWasNotReleasedIsTheSameBytesUnderItsNumber) {
  KeptLog log;
  std::vector<BatchNotice> before;
  {
    Life life(log);
    life.commit_groups(0, 4);
    for (int i = 0; i < 3; ++i) before.push_back(*life.next_batch(kAnna, 1));
    life.release(kAnna, before[1]);
  }
  Life life(log);
  EXPECT_FALSE(life.next_batch(kBerta)) << "its samples are not there yet";
  life.commit_groups(2, 4);  // in another order than before
  EXPECT_FALSE(life.next_batch(kBerta)) << "nothing overtakes the first";
  life.commit_groups(0, 1);
  for (const size_t i : {0, 2}) {
    const auto again = life.next_batch(kBerta);
    ASSERT_TRUE(again);
    EXPECT_EQ(again->batch_seq, before[i].batch_seq);
    EXPECT_EQ(again->crc32, before[i].crc32);
    EXPECT_EQ(again->num_groups, 1);
    EXPECT_EQ(again->num_complete_groups, before[i].num_complete_groups);
    life.release(kBerta, *again);
  }
  const auto fresh = life.next_batch(kBerta);
  ASSERT_TRUE(fresh);
  EXPECT_EQ(fresh->batch_seq, 4u);
  life.release(kBerta, *fresh);
  EXPECT_TRUE(log.restored.batches.empty());
  EXPECT_FALSE(life.next_batch(kBerta));
}

TEST(RestoredDelivery, AStepsSharesGoToTheirRanksAgain) {
  KeptLog log;
  std::vector<BatchNotice> before;
  const auto join = [](Life& life) {
    life.delivery.join(kAnna, {.rank = 0, .size = 2});
    life.delivery.join(kBerta, {.rank = 1, .size = 2});
  };
  {
    Life life(log);
    join(life);
    life.commit_groups(0, 3);
    before.push_back(*life.next_batch(kAnna, 3));
    before.push_back(*life.next_batch(kBerta, 3));
    life.release(kAnna, before[0]);
    life.commit_groups(3, 5);
    before.push_back(*life.next_batch(kBerta, 2));  // rank 0's share is not sent yet
  }
  EXPECT_EQ(log.restored.batches.size(), 3u);
  Life life(log);
  EXPECT_NE(
      error_text([&] { life.delivery.join(kAnna, {.rank = 0, .size = 3}); }).find("dp_size 2"),
      std::string::npos);
  join(life);
  std::set<std::pair<int32_t, int32_t>> open;
  for (const FormedBatch& batch : log.restored.batches) {
    for (const FormedSample& s : batch.samples) open.emplace(s.prompt_index, s.sample_index);
  }
  for (const auto& [p, i] : open) {
    life.delivery.commit(sample_of(1, p, i, 4, 1 + (p * 13 + i * 29) % 40));
  }
  const auto first_of_0 = life.next_batch(kAnna);
  const auto first_of_1 = life.next_batch(kBerta);
  const auto second_of_1 = life.next_batch(kBerta);
  ASSERT_TRUE(first_of_0 && first_of_1 && second_of_1);
  EXPECT_EQ(first_of_0->step, 2u);
  EXPECT_EQ(first_of_1->step, 1u);
  EXPECT_EQ(first_of_1->crc32, before[1].crc32);
  EXPECT_EQ(second_of_1->crc32, before[2].crc32);
  EXPECT_EQ(first_of_0->num_samples + second_of_1->num_samples, 8);
}

TEST(RestoredDelivery, FailuresAloneAreToldAgainUntilTheyAreReleased) {
  KeptLog log;
  uint64_t batch_seq = 0;
  {
    Life life(log);
    life.delivery.fail(failure_of(1, 0, 0, 1));
    const auto notice = life.next_batch(kAnna);
    ASSERT_TRUE(notice);
    EXPECT_FALSE(notice->lease);
    batch_seq = notice->batch_seq;
    EXPECT_GT(batch_seq, 0u);
    life.delivery.client_gone(kAnna, GoneClient::kKeepMemory);
    EXPECT_EQ(life.next_batch(kBerta)->batch_seq, batch_seq);
  }
  Life life(log);
  const auto notice = life.next_batch(kAnna);
  ASSERT_TRUE(notice);
  EXPECT_EQ(notice->batch_seq, batch_seq);
  EXPECT_EQ(notice->failed.at(0).error.code, ErrorCode::kNonFinite);
  EXPECT_NE(error_text([&] { life.release(kBerta, *notice); }).find("batch_seq"),
            std::string::npos);
  life.release(kAnna, *notice);
  EXPECT_FALSE(life.next_batch(kAnna));
  EXPECT_TRUE(log.restored.batches.empty());
}

TEST(RestoredDelivery, WhatFailsThisTimeIsAFailureOfItsBatch) {
  KeptLog log;
  {
    Life life(log);
    life.delivery.join(kAnna, {.rank = 0, .size = 1});
    life.commit_groups(0, 2);
    ASSERT_TRUE(life.next_batch(kAnna, 2));
  }
  Life life(log);
  life.delivery.join(kAnna, {.rank = 0, .size = 1});
  life.commit_groups(1, 2);
  for (const int32_t i : {0, 1, 3}) {
    life.delivery.commit(sample_of(1, 0, i, 4, 1 + (i * 29) % 40));
  }
  life.delivery.fail(failure_of(1, 0, 2, 4));
  const auto notice = life.next_batch(kAnna);
  ASSERT_TRUE(notice);
  EXPECT_EQ(notice->num_samples, 7);
  EXPECT_EQ(notice->failed.size(), 1u);
}

TEST(RestoredDelivery, ABatchThatHasGrownBeyondItsSlotFailsAndIsNotSplit) {
  KeptLog log;
  {
    Life life(log);
    life.commit_groups(0, 2);
    ASSERT_TRUE(life.next_batch(kAnna, 2));
  }
  Life life(log, /*slot_bytes=*/4096);
  for (int32_t p = 0; p < 2; ++p) {
    for (int32_t i = 0; i < 4; ++i) life.delivery.commit(sample_of(1, p, i, 4, 60));
  }
  const auto notice = life.next_batch(kAnna);
  ASSERT_TRUE(notice);
  EXPECT_FALSE(notice->lease);
  EXPECT_EQ(notice->batch_seq, 1u);
  ASSERT_EQ(notice->failed.size(), 8u);
  EXPECT_EQ(notice->failed[0].error.field, "bridge.slot_bytes");
  EXPECT_EQ(life.slots.num_free(), 4);
  life.release(kAnna, *notice);
}

TEST(RestoredDelivery, CanonicalOrderWaitsForTheGroupsThatWereLeft) {
  KeptLog log;
  log.restored.unformed = {{.request_id = 1, .prompt_indices = {1, 3}}};
  Life life(log);
  life.commit_groups(3, 4);
  const BatchWish wish{.num_groups = 1, .order = GroupOrder::kCanonical};
  EXPECT_FALSE(life.delivery.next_batch(kAnna, wish));
  life.commit_groups(1, 2);
  EXPECT_TRUE(life.delivery.next_batch(kAnna, wish));
  EXPECT_TRUE(life.delivery.next_batch(kAnna, wish));
}

}  // namespace
}  // namespace rollpack::bridge
