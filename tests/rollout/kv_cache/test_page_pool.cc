#include "rollout/kv_cache/page_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

TEST(PagePool, AllocatesAllOrNothing) {
  PagePool pool(3);
  std::vector<int32_t> pages;
  EXPECT_TRUE(pool.try_allocate(2, pages));
  EXPECT_FALSE(pool.try_allocate(2, pages));
  EXPECT_EQ(pages.size(), 2u);
  EXPECT_EQ(pool.num_free(), 1);
}

TEST(PagePool, FreesAPageWithItsLastReference) {
  PagePool pool(1);
  std::vector<int32_t> pages;
  ASSERT_TRUE(pool.try_allocate(1, pages));
  pool.add_reference(pages[0]);
  EXPECT_EQ(pool.num_references(pages[0]), 2);
  pool.release(pages[0]);
  EXPECT_EQ(pool.num_free(), 0);
  pool.release(pages[0]);
  EXPECT_EQ(pool.num_free(), 1);
}

TEST(PagePool, LetsOnlyTheSoleHolderWriteAndOnlyBehindWhatIsKept) {
  PagePool pool(1);
  std::vector<int32_t> pages;
  ASSERT_TRUE(pool.try_allocate(1, pages));
  EXPECT_TRUE(pool.is_writable(0, 0));
  pool.keep(0, 3);
  EXPECT_FALSE(pool.is_writable(0, 2));
  EXPECT_TRUE(pool.is_writable(0, 3));
  pool.add_reference(0);
  EXPECT_FALSE(pool.is_writable(0, 3));
  pool.release(0);
  pool.forget(0);
  EXPECT_TRUE(pool.is_writable(0, 0));
}

TEST(PagePool, ListsKeptPagesByWhenTheyFellIdleTheEndOfASequenceFirst) {
  PagePool pool(5);
  std::vector<int32_t> first, second;
  ASSERT_TRUE(pool.try_allocate(2, first));
  ASSERT_TRUE(pool.try_allocate(2, second));
  for (const int32_t page : {0, 1, 2, 3}) pool.keep(page, 1);
  pool.release_all(second);
  pool.release_all(first);
  EXPECT_EQ(pool.num_idle(), 4);
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_EQ(pool.num_available(), 5);
  pool.add_reference(2);  // taken from the middle of the list, and back: now the youngest
  pool.release(2);
  for (const int32_t page : {3, 1, 0, 2}) {
    EXPECT_EQ(pool.oldest_idle(), page);
    pool.forget(page);
  }
  EXPECT_EQ(pool.oldest_idle(), -1);
  EXPECT_EQ(pool.num_free(), 5);
}

TEST(PagePool, SequencesThatGrowInTurnGetConsecutivePages) {
  PagePool pool(16 * 10);
  std::vector<std::vector<int32_t>> sequences(10);
  for (int i = 0; i < 16; ++i) {
    for (auto& pages : sequences) ASSERT_TRUE(pool.try_allocate(1, pages));
  }
  for (const auto& pages : sequences) {
    for (size_t i = 1; i < pages.size(); ++i) EXPECT_EQ(pages[i], pages[i - 1] + 1);
  }
  EXPECT_EQ(pool.num_free(), 0);
}

TEST(PagePool, ALongSequenceGoesOnIntoTheNextRunUnlessOthersHaveBegunIt) {
  PagePool pool(100);
  std::vector<int32_t> longer, other;
  ASSERT_TRUE(pool.try_allocate(40, longer));
  for (int32_t i = 0; i < 40; ++i) EXPECT_EQ(longer[static_cast<size_t>(i)], i);
  ASSERT_TRUE(pool.try_allocate(1, other));
  EXPECT_EQ(other[0], 48);
  ASSERT_TRUE(pool.try_allocate(9, longer));
  EXPECT_EQ(longer[47], 47);
  EXPECT_EQ(longer[48], 64);
}

// Against a set of free pages, in every state of fragmentation.
TEST(PagePool, HandsOutEveryFreePageOnceInAnyOrderOfCalls) {
  for (const int32_t num_pages : {1, 15, 16, 17, 50, 100}) {
    PagePool pool(num_pages);
    std::vector<std::vector<int32_t>> sequences(7);
    std::vector<bool> is_used(static_cast<size_t>(num_pages));
    std::mt19937 random(static_cast<uint32_t>(num_pages));
    for (int call = 0; call < 3000; ++call) {
      auto& pages = sequences[random() % sequences.size()];
      if (random() % 4 == 0) {
        for (const int32_t page : pages) is_used[static_cast<size_t>(page)] = false;
        pool.release_all(pages);
        continue;
      }
      const auto count = static_cast<int32_t>(random() % 6);
      const size_t before = pages.size();
      const bool fits = count <= std::ranges::count(is_used, false);
      ASSERT_EQ(pool.try_allocate(count, pages), fits);
      ASSERT_EQ(pages.size() - before, fits ? static_cast<size_t>(count) : 0u);
      for (size_t i = before; i < pages.size(); ++i) {
        ASSERT_GE(pages[i], 0);
        ASSERT_LT(pages[i], num_pages);
        ASSERT_FALSE(is_used[static_cast<size_t>(pages[i])]) << pages[i];
        is_used[static_cast<size_t>(pages[i])] = true;
      }
      ASSERT_EQ(pool.num_free(), std::ranges::count(is_used, false));
    }
  }
}

TEST(PagePool, RefusesWhatWouldLoseCount) {
  PagePool pool(1);
  EXPECT_THROW(pool.release(0), Error);
  EXPECT_THROW(pool.add_reference(0), Error);
  EXPECT_THROW(pool.keep(0, 1), Error);
  EXPECT_THROW(pool.forget(0), Error);
}

}  // namespace
}  // namespace rollpack::rollout
