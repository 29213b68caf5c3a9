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
  EXPECT_TRUE(pool.is_shared(pages[0]));
  pool.release(pages[0]);
  EXPECT_EQ(pool.num_free(), 0);
  pool.release(pages[0]);
  EXPECT_EQ(pool.num_free(), 1);
}

TEST(PagePool, RefusesToReleaseOrShareAFreePage) {
  PagePool pool(1);
  EXPECT_THROW(pool.release(0), Error);
  EXPECT_THROW(pool.add_reference(0), Error);
}

}  // namespace
}  // namespace rollpack::rollout
