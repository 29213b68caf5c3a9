// Steps that are split for data-parallel ranks: each rank its share, whoever asks first, and again
// to the same rank when its client goes.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/error_text.h"
#include "tests/trainer_bridge/delivery/made_samples.h"
#include "tests/trainer_bridge/layout/batch_reader.h"
#include "trainer_bridge/delivery/delivery.h"

namespace rollpack::bridge {
namespace {

using namespace testing;
using rollpack::testing::error_text;

constexpr uint64_t kPlain = 99;

// Sample (prompt, index) pairs of a batch, row by row.
using Rows = std::vector<std::vector<std::pair<int32_t, int32_t>>>;

struct World {
  explicit World(int32_t num_slots = 4, LayoutOptions layout_options = {.max_tokens_per_row = 64},
                 int64_t slot_bytes = 1 << 16)
      : layout(make_layout(layout_options)),
        slots(num_slots, slot_bytes),
        delivery(slots, *layout) {
    delivery.configure({.attention_parity_tokens = 16});
  }

  void join(uint64_t client, int32_t rank, int32_t size, bool whole = false) {
    delivery.join(client, {.rank = rank, .size = size, .keeps_groups_whole = whole});
  }

  // Groups of 4 samples of 1 to 40 response tokens, the lengths a function of prompt and index.
  void commit_groups(int32_t num_groups, int64_t request = 1) {
    for (int32_t p = 0; p < num_groups; ++p) {
      for (int32_t i = 0; i < 4; ++i) {
        delivery.commit(sample_of(request, p, i, 4, 1 + (p * 13 + i * 29) % 40));
      }
    }
  }

  std::vector<std::byte> bytes_of(const BatchNotice& notice) const {
    const auto mapped =
        MappedSegment::map(slots.fd(notice.lease->slot), notice.bytes, kOwnerSeals, "test");
    return {mapped.bytes().begin(), mapped.bytes().end()};
  }

  Rows rows_of(const BatchNotice& notice) const {
    const ReadBatch batch = read_batch(bytes_of(notice));
    const auto prompts = batch.values<int32_t>("prompt_index");
    const auto indices = batch.values<int32_t>("sample_index");
    const auto starts = batch.values<int32_t>("row_starts");
    const auto cu_seqlens = batch.values<int32_t>("cu_seqlens");
    Rows rows;
    for (size_t m = 0; m + 1 < starts.size(); ++m) {
      EXPECT_LE(cu_seqlens[starts[m + 1]] - cu_seqlens[starts[m]], 64);
      rows.emplace_back();
      for (int32_t s = starts[m]; s < starts[m + 1]; ++s) {
        rows.back().emplace_back(prompts[s], indices[s]);
      }
    }
    return rows;
  }

  BatchNotice take(uint64_t client, int64_t num_groups = 4) {
    auto notice = delivery.next_batch(client, {.num_groups = num_groups});
    EXPECT_TRUE(notice);
    return notice.value_or(BatchNotice{});
  }

  void release(uint64_t client, const BatchNotice& notice) {
    delivery.release(client, *notice.lease, notice.batch_seq);
  }

  std::unique_ptr<BatchLayout> layout;
  SlotRing slots;
  Delivery delivery;
};

TEST(DpDelivery, ShareIsTheSameInWhateverOrderRanksAsk) {
  std::map<int32_t, Rows> first;
  std::vector<int32_t> order = {0, 1, 2};
  do {
    World world;
    for (int32_t rank = 0; rank < 3; ++rank) world.join(rank, rank, 3);
    world.commit_groups(4);
    size_t num_samples = 0, num_rows = 0;
    for (const int32_t rank : order) {
      const BatchNotice notice = world.take(rank);
      EXPECT_EQ(notice.step, 1u);
      EXPECT_EQ(notice.dp_rank, rank);
      EXPECT_EQ(notice.num_groups, 4);
      EXPECT_EQ(notice.num_complete_groups, 4);
      const Rows rows = world.rows_of(notice);
      num_samples += static_cast<size_t>(notice.num_samples);
      if (num_rows > 0) {
        EXPECT_EQ(rows.size(), num_rows);
      }
      num_rows = rows.size();
      const auto [same, is_new] = first.try_emplace(rank, rows);
      EXPECT_EQ(same->second, rows) << "rank " << rank;
    }
    EXPECT_EQ(num_samples, 16u);
    EXPECT_FALSE(world.delivery.next_batch(0, {}));
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(DpDelivery, ARankThatAsksAheadDoesNotTakeFromTheOthers) {
  World world(6);
  world.join(1, 0, 2);
  world.join(2, 1, 2);
  world.commit_groups(8);
  const BatchNotice a1 = world.take(1), a2 = world.take(1);
  const BatchNotice b1 = world.take(2), b2 = world.take(2);
  EXPECT_EQ(std::vector({a1.step, a2.step, b1.step, b2.step}), (std::vector<uint64_t>{1, 2, 1, 2}));
  std::set<std::pair<int32_t, int32_t>> seen;
  for (const BatchNotice* notice : {&a1, &a2, &b1, &b2}) {
    for (const auto& row : world.rows_of(*notice)) seen.insert(row.begin(), row.end());
  }
  EXPECT_EQ(seen.size(), 32u);
}

TEST(DpDelivery, GroupsAreKeptWholeOnRequest) {
  World world;
  world.join(1, 0, 2, true);
  world.join(2, 1, 2, true);
  world.commit_groups(6);
  std::map<int32_t, std::set<uint64_t>> ranks_of_group;
  for (const uint64_t client : {1, 2}) {
    for (const auto& row : world.rows_of(world.take(client, 6))) {
      for (const auto& [prompt, index] : row) ranks_of_group[prompt].insert(client);
    }
  }
  ASSERT_EQ(ranks_of_group.size(), 6u);
  for (const auto& [prompt, ranks] : ranks_of_group) EXPECT_EQ(ranks.size(), 1u) << prompt;
}

TEST(DpDelivery, AShareComesAgainToTheSameRankAlone) {
  World world;
  world.join(1, 0, 2);
  world.join(2, 1, 2);
  world.commit_groups(8);
  const BatchNotice held = world.take(1);
  const std::vector<std::byte> bytes = world.bytes_of(held);
  const BatchNotice other = world.take(2);
  world.release(2, other);
  world.delivery.client_gone(1, GoneClient::kKeepMemory);
  EXPECT_EQ(world.take(2).step, 2u);  // not rank 0's share of step 1
  world.join(3, 0, 2);
  const BatchNotice again = world.take(3);
  EXPECT_EQ(again.batch_seq, held.batch_seq);
  EXPECT_EQ(again.dp_rank, 0);
  EXPECT_EQ(world.bytes_of(again), bytes);
  EXPECT_EQ(world.take(3).step, 2u);
}

TEST(DpDelivery, SharesWaitForASlotAndForTheirRank) {
  World world(1);
  world.join(1, 0, 2);
  world.join(2, 1, 2);
  world.commit_groups(4);
  const BatchNotice first = world.take(1);
  EXPECT_FALSE(world.delivery.next_batch(2, {}));
  EXPECT_EQ(world.delivery.num_held_samples(), 16 - first.num_samples);
  world.release(1, first);
  EXPECT_EQ(world.take(2).step, 1u);
  EXPECT_EQ(world.delivery.num_held_samples(), 0);
}

TEST(DpDelivery, FailuresGoWithTheirGroupOrToRankZero) {
  World world;
  world.join(1, 0, 2, true);
  world.join(2, 1, 2, true);
  for (int32_t p = 0; p < 2; ++p) {
    world.delivery.commit(sample_of(1, p, 0, 2, 4));
    world.delivery.fail(failure_of(1, p, 1, 2));
  }
  world.delivery.fail(failure_of(1, 2, 0, 1));
  const BatchNotice zero = world.take(1, 3), one = world.take(2, 3);
  EXPECT_EQ(zero.num_samples + one.num_samples, 2);
  ASSERT_EQ(zero.failed.size(), 2u);
  ASSERT_EQ(one.failed.size(), 1u);
  EXPECT_EQ(one.failed[0].key.prompt_index, world.rows_of(one)[0][0].first);
  EXPECT_EQ(zero.num_complete_groups, 0);
  EXPECT_EQ(one.num_groups, 3);
}

TEST(DpDelivery, ARankWithoutSamplesGetsAnEmptyBatchWithTheOthersRows) {
  World world;
  world.join(1, 0, 2);
  world.join(2, 1, 2);
  world.delivery.commit(sample_of(1, 0, 0, 1, 9));
  const BatchNotice one = world.take(2, 1), zero = world.take(1, 1);
  EXPECT_EQ(zero.num_samples, 1);
  EXPECT_EQ(one.num_samples, 0);
  ASSERT_TRUE(one.lease);
  EXPECT_EQ(world.rows_of(one), (Rows{{}}));
  world.delivery.fail(failure_of(2, 0, 0, 1));
  const BatchNotice failed = world.take(1, 1), nothing = world.take(2, 1);
  EXPECT_FALSE(failed.lease);
  EXPECT_EQ(failed.failed.size(), 1u);
  EXPECT_FALSE(nothing.lease);
  EXPECT_EQ(nothing.step, 2u);
  EXPECT_TRUE(nothing.failed.empty());
}

TEST(DpDelivery, AStepIsAsManyGroupsAsTheSharesFit) {
  World world(4, {.max_tokens_per_row = 64}, 8192);
  world.join(1, 0, 2);
  world.join(2, 1, 2);
  world.commit_groups(40);
  int64_t num_groups = 0;
  while (auto a = world.delivery.next_batch(1, {.min_ready = 1})) {
    auto b = world.delivery.next_batch(2, {});
    ASSERT_TRUE(b);
    EXPECT_EQ(a->step, b->step);
    EXPECT_TRUE(a->failed.empty());
    num_groups += a->num_groups;
    world.release(1, *a);
    world.release(2, *b);
  }
  EXPECT_EQ(num_groups, 40);
}

TEST(DpDelivery, PaddedSharesDifferByOneSampleAtMost) {
  World world(4, {.layout = "padded"});
  for (int32_t rank = 0; rank < 3; ++rank) world.join(rank, rank, 3);
  world.commit_groups(4);
  for (int32_t rank = 0; rank < 3; ++rank) {
    const int64_t num_samples = world.take(rank).num_samples;
    EXPECT_TRUE(num_samples == 5 || num_samples == 6) << num_samples;
  }
}

TEST(DpDelivery, AnotherSplitIsRefusedWhileThisOneLives) {
  World world;
  world.join(1, 0, 2);
  EXPECT_EQ(error_text([&] { world.join(2, 1, 4); }),
            "failed_precondition: dp_size = dp_size 4 (hello): expected dp_size 2; 1 clients are "
            "ranks of it");
  EXPECT_EQ(error_text([&] { world.join(2, 1, 2, true); }),
            "failed_precondition: dp_size = dp_size 2 with whole_groups (hello): expected dp_size "
            "2; 1 clients are ranks of it");
  world.commit_groups(4);
  world.take(1);
  world.delivery.client_gone(1, GoneClient::kKeepMemory);
  EXPECT_EQ(error_text([&] { world.join(2, 1, 4); }),
            "failed_precondition: dp_size = dp_size 4 (hello): expected dp_size 2; 2 batches split "
            "so are not acknowledged: take them with such ranks, or without dp_rank");
  // A client that is no rank may have both, as no rank is there to take them.
  for (const int32_t rank : {0, 1}) {
    const BatchNotice left = world.take(kPlain);
    EXPECT_EQ(left.dp_rank, rank);
    world.release(kPlain, left);
  }
  world.join(2, 1, 4);
}

TEST(DpDelivery, AClientThatIsNoRankTakesWholeBatchesBesides) {
  World world;
  world.join(1, 0, 2);
  world.join(2, 1, 2);
  world.commit_groups(6);
  world.take(1);
  const BatchNotice whole = world.take(kPlain, 2);
  EXPECT_EQ(whole.step, 0u);
  EXPECT_FALSE(whole.dp_rank);
  EXPECT_EQ(whole.num_samples, 8);
  EXPECT_EQ(world.take(2).step, 1u);
}

}  // namespace
}  // namespace rollpack::bridge
