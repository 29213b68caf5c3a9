#include "rollout/kv_cache/page_pool.h"

#include <gtest/gtest.h>

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

TEST(PagePool, RefusesWhatWouldLoseCount) {
  PagePool pool(1);
  EXPECT_THROW(pool.release(0), Error);
  EXPECT_THROW(pool.add_reference(0), Error);
  EXPECT_THROW(pool.keep(0, 1), Error);
  EXPECT_THROW(pool.forget(0), Error);
}

}  // namespace
}  // namespace rollpack::rollout
