// Groups, batches, acknowledgements: which samples come in which batch, and what becomes of a batch
// whose client goes at any point of its life.
#include "trainer_bridge/delivery/delivery.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/base/checksum.h"
#include "tests/trainer_bridge/delivery/made_samples.h"
#include "tests/trainer_bridge/layout/batch_reader.h"
#include "trainer_bridge/contract/batch_schema.h"

namespace rollpack::bridge {
namespace {

using testing::failure_of;
using testing::kAnna;
using testing::kBerta;
using testing::read_batch;
using testing::ReadBatch;
using testing::sample_of;

ErrorInfo error_of(const std::function<void()>& act) {
  try {
    act();
  } catch (const Error& error) {
    return error.info;
  }
  return {.message = "no error"};
}

class DeliveryTest : public ::testing::Test {
 protected:
  explicit DeliveryTest(int32_t num_slots = 2, int64_t slot_bytes = 1 << 16,
                        LayoutOptions options = {})
      : layout(make_layout(options)), slots(num_slots, slot_bytes), delivery(slots, *layout) {}

  void commit_group(int64_t request, int32_t prompt, int32_t group, int32_t tokens = 4) {
    for (int32_t i = group; i-- > 0;) delivery.commit(sample_of(request, prompt, i, group, tokens));
  }

  std::vector<std::byte> bytes_of(const BatchNotice& notice) {
    const auto mapped =
        MappedSegment::map(slots.fd(notice.lease->slot), notice.bytes, kOwnerSeals, "test");
    return {mapped.bytes().begin(), mapped.bytes().end()};
  }

  // Prompt indices of a batch, once for each sample.
  std::vector<int32_t> prompts_of(const BatchNotice& notice) {
    return read_batch(bytes_of(notice)).values<int32_t>("prompt_index");
  }

  std::optional<BatchNotice> next_batch(uint64_t client,
                                        std::optional<int64_t> num_groups = std::nullopt) {
    return delivery.next_batch(client, {.num_groups = num_groups});
  }

  void release(uint64_t client, const BatchNotice& notice) {
    delivery.release(client, *notice.lease, notice.batch_seq);
  }

  double stat(const std::string& wanted) const {
    for (const auto& [name, value] : delivery.stats()) {
      if (name == wanted) return value;
    }
    return -1;
  }

  std::unique_ptr<BatchLayout> layout;
  SlotRing slots;
  Delivery delivery;
};

TEST_F(DeliveryTest, OnlyWholeGroupsAreDelivered) {
  delivery.commit(sample_of(1, 0, 1, 3, 4));
  delivery.commit(sample_of(1, 0, 0, 3, 4));
  EXPECT_FALSE(next_batch(kAnna));
  delivery.fail(failure_of(1, 0, 2, 3));
  const auto notice = next_batch(kAnna);
  ASSERT_TRUE(notice);
  EXPECT_EQ(notice->num_groups, 1);
  EXPECT_EQ(notice->num_samples, 2);
  ASSERT_EQ(notice->failed.size(), 1u);
  EXPECT_EQ(notice->failed[0].key.sample_index, 2);
  EXPECT_EQ(notice->failed[0].error.code, ErrorCode::kNonFinite);
}

TEST_F(DeliveryTest, HeaderAndNoticeAgreeAndTheChecksumHolds) {
  commit_group(1, 0, 2);
  const auto notice = next_batch(kAnna);
  const std::vector<std::byte> bytes = bytes_of(*notice);
  const ReadBatch batch = read_batch(bytes);
  EXPECT_EQ(batch.batch_seq, 1u);
  EXPECT_EQ(batch.batch_seq, notice->batch_seq);
  EXPECT_EQ(batch.generation, notice->lease->generation);
  EXPECT_EQ(batch.bytes, static_cast<uint64_t>(notice->bytes));
  EXPECT_EQ(batch.crc32, notice->crc32);
  EXPECT_EQ(crc32_of(std::span(bytes).subspan(sizeof(BatchHeader))), notice->crc32);
}

TEST_F(DeliveryTest, PadsThatABatchDoesWithoutAreCounted) {
  commit_group(1, 0, 2, /*tokens=*/4);
  commit_group(1, 1, 1, /*tokens=*/9);
  ASSERT_TRUE(next_batch(kAnna));
  EXPECT_EQ(stat("num_tokens_delivered"), 7 + 7 + 12);
  EXPECT_EQ(stat("num_pads_delivered"), 0);
  EXPECT_EQ(stat("num_pads_avoided"), 3 * (3 + 9) - 26);
}

class PaddedDeliveryTest : public DeliveryTest {
 protected:
  PaddedDeliveryTest()
      : DeliveryTest(2, 1 << 16, {.layout = "padded", .prompt_width = 8, .response_width = 16}) {}
};

TEST_F(PaddedDeliveryTest, PadsThatABatchHasAreCountedAndNoneIsAvoided) {
  commit_group(1, 0, 2, /*tokens=*/4);
  ASSERT_TRUE(next_batch(kAnna));
  EXPECT_EQ(stat("num_tokens_delivered"), 14);
  EXPECT_EQ(stat("num_pads_delivered"), 2 * (8 + 16) - 14);
  EXPECT_EQ(stat("num_pads_avoided"), 0);
}

TEST_F(DeliveryTest, GroupsComeInOrderOfFinishing) {
  delivery.commit(sample_of(1, 0, 0, 2, 4));  // begins first, finishes last
  commit_group(1, 2, 2);
  commit_group(1, 1, 3);
  delivery.commit(sample_of(1, 0, 1, 2, 4));
  for (const int32_t prompt : {2, 1, 0}) {
    const auto notice = next_batch(kAnna, 1);
    ASSERT_TRUE(notice);
    EXPECT_EQ(prompts_of(*notice).front(), prompt);
    EXPECT_EQ(notice->num_samples, prompt == 1 ? 3 : 2);
    release(kAnna, *notice);
  }
}

TEST_F(DeliveryTest, TheSameSamplesGiveTheSameColumnsInWhateverOrderTheyWereCommitted) {
  for (const int32_t index : {0, 1, 2}) delivery.commit(sample_of(1, 0, index, 3, 4));
  const auto first = next_batch(kAnna, 1);
  for (const int32_t index : {2, 0, 1}) delivery.commit(sample_of(1, 0, index, 3, 4));
  const auto second = next_batch(kAnna, 1);
  EXPECT_EQ(first->crc32, second->crc32);
}

TEST_F(DeliveryTest, AGivenNumberOfGroupsIsWaitedForAndNotExceeded) {
  commit_group(1, 0, 2);
  EXPECT_FALSE(next_batch(kAnna, 2));
  commit_group(1, 1, 2);
  commit_group(1, 2, 2);
  const auto first = next_batch(kAnna, 2);
  ASSERT_TRUE(first);
  EXPECT_EQ(first->num_groups, 2);
  EXPECT_FALSE(next_batch(kAnna, 2));
  const auto second = next_batch(kAnna);
  EXPECT_EQ(prompts_of(*second), (std::vector<int32_t>{2, 2}));
  EXPECT_EQ(second->batch_seq, first->batch_seq + 1);
}

TEST_F(DeliveryTest, PartialSamplesAreSamples) {
  Sample cut = sample_of(1, 0, 0, 2, 0);
  cut.finish_reason = FinishReason::kAbort;
  delivery.commit(std::move(cut));
  delivery.commit(sample_of(1, 0, 1, 2, 3));
  const auto notice = next_batch(kAnna);
  EXPECT_EQ(notice->num_samples, 2);
  EXPECT_TRUE(notice->failed.empty());
}

TEST_F(DeliveryTest, FailuresAloneTakeNoSlot) {
  for (int32_t prompt = 0; prompt < 3; ++prompt) delivery.fail(failure_of(1, prompt, 0, 1));
  const auto notice = next_batch(kAnna, 3);
  ASSERT_TRUE(notice);
  EXPECT_FALSE(notice->lease);
  EXPECT_EQ(notice->failed.size(), 3u);
  EXPECT_EQ(notice->num_groups, 3);
  EXPECT_EQ(slots.num_free(), 2);
}

TEST_F(DeliveryTest, ADuplicateIsDroppedAndCounted) {
  delivery.commit(sample_of(1, 0, 0, 2, 4));
  delivery.commit(sample_of(1, 0, 0, 2, 9));
  delivery.fail(failure_of(1, 0, 0, 2));
  EXPECT_EQ(stat("num_duplicate_samples"), 2);
  delivery.commit(sample_of(1, 0, 1, 2, 4));
  delivery.commit(sample_of(1, 0, 1, 2, 9));  // its group is finished, but still here
  EXPECT_EQ(stat("num_duplicate_samples"), 3);
  const auto notice = next_batch(kAnna);
  EXPECT_EQ(notice->num_samples, 2);
  EXPECT_EQ(read_batch(bytes_of(*notice)).values<int32_t>("response_lens"),
            (std::vector<int32_t>{4, 4}));
}

TEST_F(DeliveryTest, AKeyAtOddsWithItsGroupIsABrokenInvariant) {
  delivery.commit(sample_of(1, 0, 0, 2, 4));
  EXPECT_EQ(error_of([&] { delivery.commit(sample_of(1, 0, 1, 3, 4)); }).message,
            "request 1, prompt 0 has groups of 2 and of 3");
  EXPECT_EQ(error_of([&] { delivery.commit(sample_of(1, 1, 5, 3, 4)); }).message,
            "sample 5 of a group of 3 (request 1, prompt 1)");
}

TEST_F(DeliveryTest, NoFreeSlotMeansWaitingForARelease) {
  for (int32_t prompt = 0; prompt < 3; ++prompt) commit_group(1, prompt, 1);
  const auto first = next_batch(kAnna, 1);
  const auto second = next_batch(kAnna, 1);
  ASSERT_TRUE(first && second);
  EXPECT_FALSE(next_batch(kAnna, 1));
  EXPECT_EQ(delivery.num_held_samples(), 1);
  release(kAnna, *first);
  const auto third = next_batch(kAnna, 1);
  ASSERT_TRUE(third);
  EXPECT_EQ(third->lease->slot, first->lease->slot);
  EXPECT_EQ(third->lease->generation, first->lease->generation + 1);
}

TEST_F(DeliveryTest, ReleasesThatAreNotTheClientsAreErrors) {
  commit_group(1, 0, 1);
  const auto notice = *next_batch(kAnna, 1);
  EXPECT_EQ(error_of([&] {
              delivery.release(kAnna, SlotLease{9, 1}, 1);
            }).code,
            ErrorCode::kNotFound);
  EXPECT_EQ(error_of([&] {
              delivery.release(kAnna, SlotLease{1, 1}, 1);
            }).code,
            ErrorCode::kFailedPrecondition);
  EXPECT_EQ(error_of([&] { release(kBerta, notice); }).code, ErrorCode::kFailedPrecondition);
  EXPECT_EQ(error_of([&] { delivery.release(kAnna, *notice.lease, 7); }).allowed,
            "1, which slot 0 holds");
  release(kAnna, notice);
  EXPECT_EQ(error_of([&] { release(kAnna, notice); }).code, ErrorCode::kFailedPrecondition);
  EXPECT_EQ(slots.num_free(), 2);
}

TEST_F(DeliveryTest, WhatAGoneClientHeldComesAgainFirstAndByteForByte) {
  for (const GoneClient memory : {GoneClient::kKeepMemory, GoneClient::kReplaceMemory}) {
    commit_group(1, 0, 2);
    delivery.fail(failure_of(2, 0, 0, 1));
    const auto first = *next_batch(kAnna);
    const std::vector<std::byte> bytes = bytes_of(first);
    commit_group(1, 1, 2);
    const auto second = *next_batch(kAnna);
    commit_group(1, 2, 2);
    delivery.client_gone(kAnna, memory);
    const auto again = *next_batch(kBerta, 1);
    EXPECT_EQ(again.batch_seq, first.batch_seq);
    EXPECT_EQ(*again.lease, *first.lease);
    EXPECT_EQ(again.num_groups, 2);
    EXPECT_EQ(again.failed.size(), 1u);
    EXPECT_TRUE(bytes_of(again) == bytes);
    EXPECT_EQ(next_batch(kBerta, 1)->batch_seq, second.batch_seq);
    release(kBerta, again);
    EXPECT_EQ(prompts_of(*next_batch(kBerta, 1)), (std::vector<int32_t>{2, 2}));
    delivery.client_gone(kBerta, memory);  // the last two; taken and released by a third
    while (const auto rest = next_batch(3)) release(3, *rest);
    EXPECT_EQ(slots.num_free(), 2);
  }
  EXPECT_EQ(stat("num_batches_redelivered"), 8);
}

TEST_F(DeliveryTest, WhatWasReleasedBeforeTheClientWentDoesNotComeAgain) {
  commit_group(1, 0, 1);
  commit_group(1, 1, 1);
  const auto first = *next_batch(kAnna, 1);
  const auto second = *next_batch(kAnna, 1);
  release(kAnna, first);
  delivery.client_gone(kAnna, GoneClient::kKeepMemory);
  EXPECT_EQ(next_batch(kBerta, 1)->batch_seq, second.batch_seq);
  EXPECT_FALSE(next_batch(kBerta));
}

TEST_F(DeliveryTest, ReplacedMemoryLeavesOldMapsAsTheyWere) {
  commit_group(1, 0, 2);
  const auto first = *next_batch(kAnna);
  const auto old_map =
      MappedSegment::map(slots.fd(first.lease->slot), first.bytes, kOwnerSeals, "test");
  const std::vector<std::byte> before(old_map.bytes().begin(), old_map.bytes().end());
  delivery.client_gone(kAnna, GoneClient::kReplaceMemory);
  release(kBerta, *next_batch(kBerta));
  for (int32_t prompt = 1; prompt < 4; ++prompt) {
    commit_group(1, prompt, 3);
    release(kBerta, *next_batch(kBerta));
  }
  EXPECT_TRUE(std::equal(before.begin(), before.end(), old_map.bytes().begin()));
}

// 8 KiB: header, table and alignment of the columns take some 3.5 of them.
class SmallSlots : public DeliveryTest {
 protected:
  SmallSlots() : DeliveryTest(2, 8192) {}
};

TEST_F(SmallSlots, AsManyGroupsAsFitAndTheRestNextTime) {
  for (int32_t prompt = 0; prompt < 20; ++prompt) commit_group(1, prompt, 2, 8);
  std::vector<int32_t> prompts;
  int num_batches = 0;
  for (; const auto notice = next_batch(kAnna); ++num_batches) {
    EXPECT_LE(notice->bytes, 8192);
    EXPECT_EQ(notice->num_samples, 2 * notice->num_groups);
    for (const int32_t prompt : prompts_of(*notice)) prompts.push_back(prompt);
    release(kAnna, *notice);
  }
  EXPECT_GT(num_batches, 2);
  EXPECT_LT(num_batches, 20);
  std::sort(prompts.begin(), prompts.end());
  ASSERT_EQ(prompts.size(), 40u);
  for (size_t i = 0; i < prompts.size(); ++i) EXPECT_EQ(prompts[i], static_cast<int32_t>(i / 2));
}

TEST_F(SmallSlots, AGivenNumberThatDoesNotFitIsSplitBetweenGroups) {
  for (int32_t prompt = 0; prompt < 20; ++prompt) commit_group(1, prompt, 2, 8);
  const auto notice = next_batch(kAnna, 20);
  ASSERT_TRUE(notice);
  EXPECT_GE(notice->num_groups, 1);
  EXPECT_LT(notice->num_groups, 20);
  // One more group would not have fitted.
  std::vector<Sample> samples;
  for (int32_t prompt = 0; prompt <= notice->num_groups; ++prompt) {
    for (int32_t i = 0; i < 2; ++i) samples.push_back(sample_of(1, prompt, i, 2, 8));
  }
  std::vector<const Sample*> pointers;
  for (const Sample& sample : samples) pointers.push_back(&sample);
  EXPECT_GT(layout->batch_bytes(pointers), 8192);
}

TEST_F(SmallSlots, AGroupTooBigForASlotFailsNamingSlotBytesAndTheBytesNeeded) {
  commit_group(7, 3, 2, 1000);
  commit_group(7, 4, 2, 8);
  const auto notice = next_batch(kAnna, 2);
  ASSERT_TRUE(notice);
  EXPECT_EQ(notice->num_samples, 2);
  ASSERT_EQ(notice->failed.size(), 2u);
  const ErrorInfo& error = notice->failed[1].error;
  EXPECT_EQ(notice->failed[1].key.prompt_index, 3);
  EXPECT_EQ(error.code, ErrorCode::kResourceExhausted);
  EXPECT_EQ(error.field, "bridge.slot_bytes");
  EXPECT_EQ(error.value, "8192");
  EXPECT_EQ(error.origin, "request 7, prompt 3");
  const int64_t needed = std::stoll(error.allowed.substr(std::strlen("at least ")));
  std::vector<Sample> samples = {sample_of(7, 3, 0, 2, 1000), sample_of(7, 3, 1, 2, 1000)};
  const Sample* const pointers[] = {&samples[0], &samples[1]};
  EXPECT_EQ(needed, layout->batch_bytes(pointers));
}

class ShortRows : public DeliveryTest {
 protected:
  ShortRows() : DeliveryTest(2, 1 << 16, {.max_tokens_per_row = 16}) {}
};

TEST_F(ShortRows, ASampleNoRowCanHoldFailsAloneAndItsSiblingsAreDelivered) {
  delivery.commit(sample_of(1, 0, 0, 2, 4));
  delivery.commit(sample_of(1, 0, 1, 2, 40));
  const auto notice = next_batch(kAnna);
  EXPECT_EQ(notice->num_samples, 1);
  ASSERT_EQ(notice->failed.size(), 1u);
  EXPECT_EQ(notice->failed[0].key.sample_index, 1);
  EXPECT_EQ(notice->failed[0].error.field, "bridge.max_tokens_per_row");
}

class PaddedSlots : public DeliveryTest {
 protected:
  PaddedSlots() : DeliveryTest(1, 32768, {.layout = "padded"}) {}
};

// One long response pads every other row, so sizes do not add up; what is delivered fits all the
// same and nothing is lost.
TEST_F(PaddedSlots, BatchesFitThoughSizesDoNotAddUp) {
  int64_t num_samples = 0;
  for (int32_t prompt = 0; prompt < 60; ++prompt) {
    commit_group(1, prompt, 2, prompt % 10 == 9 ? 200 : 3);
  }
  while (const auto notice = next_batch(kAnna)) {
    EXPECT_LE(notice->bytes, 32768);
    EXPECT_TRUE(notice->failed.empty());
    num_samples += notice->num_samples;
    release(kAnna, *notice);
  }
  EXPECT_EQ(num_samples, 120);
  EXPECT_EQ(delivery.num_held_samples(), 0);
}

}  // namespace
}  // namespace rollpack::bridge
