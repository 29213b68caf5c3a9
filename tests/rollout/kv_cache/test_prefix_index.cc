#include "rollout/kv_cache/prefix_index.h"

#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <random>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

constexpr int32_t kPageTokens = 4;
using Tokens = std::vector<int32_t>;

struct Rig {
  explicit Rig(int32_t num_pages = 16) : pool(num_pages), index(pool, kPageTokens) {}

  // Files `tokens` in fresh pages and lets them go. Returns the pages they ended in.
  std::vector<int32_t> cache(const Tokens& tokens) {
    std::vector<int32_t> pages;
    const auto num_pages = static_cast<int32_t>((tokens.size() + kPageTokens - 1) / kPageTokens);
    index.make_free(num_pages);
    EXPECT_TRUE(pool.try_allocate(num_pages, pages));
    index.insert(0, tokens, 0, pages);
    const std::vector<int32_t> filed = pages;
    pool.release_all(pages);
    EXPECT_NO_THROW(index.check());
    return filed;
  }
  int32_t num_found(const Tokens& tokens) const { return index.find(0, tokens).num_tokens; }

  PagePool pool;
  PrefixIndex index;
};

Tokens ascending(int32_t count) {
  Tokens tokens(count);
  std::iota(tokens.begin(), tokens.end(), 1);
  return tokens;
}

TEST(PrefixIndex, FindsTheLongestCommonBeginning) {
  Rig rig;
  const std::vector<int32_t> pages = rig.cache(ascending(10));
  EXPECT_EQ(rig.index.find(0, ascending(10)).pages, pages);
  EXPECT_EQ(rig.num_found(ascending(12)), 10);
  EXPECT_EQ(rig.num_found(ascending(9)), 9);
  EXPECT_EQ(rig.num_found(ascending(8)), 8);
  EXPECT_EQ(rig.num_found({1, 2, 3, 4, 5, 6, 0}), 6);
  EXPECT_EQ(rig.index.find(0, Tokens{1, 2, 9}).pages, std::vector{pages[0]});
  EXPECT_EQ(rig.num_found({2, 3, 4, 5}), 0) << "tokens of another position";
  EXPECT_EQ(rig.num_found({}), 0);
}

TEST(PrefixIndex, FindsTheLikestOfManyContinuations) {
  Rig rig(64);
  for (const int32_t token : {7, 3, 9, 5}) {
    for (const int32_t next : {1, 8}) rig.cache({1, 2, 3, 4, token, token, next, 0});
  }
  EXPECT_EQ(rig.index.num_pages(), 1 + 8);
  EXPECT_EQ(rig.num_found({1, 2, 3, 4, 5, 5, 8, 0, 6}), 8);
  EXPECT_EQ(rig.num_found({1, 2, 3, 4, 5, 5, 7, 0, 6}), 6);
  EXPECT_EQ(rig.num_found({1, 2, 3, 4, 5, 4}), 5);
  EXPECT_EQ(rig.num_found({1, 2, 3, 4, 6}), 4);
}

TEST(PrefixIndex, AnswersNothingForOtherWeights) {
  Rig rig;
  rig.cache(ascending(8));
  EXPECT_EQ(rig.index.find(1, ascending(8)).num_tokens, 0);
  rig.index.begin_version(1);
  EXPECT_EQ(rig.index.find(0, ascending(8)).num_tokens, 0);
  EXPECT_EQ(rig.index.find(1, ascending(8)).num_tokens, 0);
  EXPECT_EQ(rig.pool.num_free(), rig.pool.num_pages());
  std::vector<int32_t> pages;
  ASSERT_TRUE(rig.pool.try_allocate(2, pages));
  EXPECT_EQ(rig.index.insert(0, ascending(8), 0, pages), 0) << "pages of weights that are gone";
  rig.pool.release_all(pages);
  EXPECT_EQ(rig.index.num_pages(), 0);
}

TEST(PrefixIndex, ExchangesAPageComputedTwice) {
  Rig rig;
  const std::vector<int32_t> filed = rig.cache(ascending(8));
  std::vector<int32_t> pages;
  ASSERT_TRUE(rig.pool.try_allocate(3, pages));
  const int32_t own = pages[2];
  EXPECT_EQ(rig.index.insert(0, ascending(11), 0, pages), 2);
  EXPECT_EQ(pages, (std::vector{filed[0], filed[1], own}));
  EXPECT_EQ(rig.pool.num_free(), rig.pool.num_pages() - 3);
  EXPECT_NO_THROW(rig.index.check());
}

TEST(PrefixIndex, GrowsAPageInPlaceAndGoesOnFromWhatIsFiled) {
  Rig rig;
  std::vector<int32_t> pages;
  ASSERT_TRUE(rig.pool.try_allocate(2, pages));
  const std::vector<int32_t> own = pages;
  EXPECT_EQ(rig.index.insert(0, ascending(6), 0, pages), 1);
  EXPECT_TRUE(rig.pool.is_writable(pages[1], 2)) << "behind the two slots that are kept";
  EXPECT_FALSE(rig.pool.is_writable(pages[1], 1));
  EXPECT_EQ(rig.index.insert(0, ascending(8), 1, pages), 2);
  EXPECT_EQ(pages, own);
  EXPECT_EQ(rig.index.num_pages(), 2);
  EXPECT_EQ(rig.num_found(ascending(9)), 8);
}

TEST(PrefixIndex, ReplacesHalfAPageByTheWholeOneOfAnotherSequence) {
  Rig rig;
  std::vector<int32_t> pages;
  ASSERT_TRUE(rig.pool.try_allocate(1, pages));
  rig.index.insert(0, ascending(2), 0, pages);
  rig.cache(ascending(4));
  EXPECT_EQ(rig.index.num_pages(), 1);
  EXPECT_TRUE(rig.pool.is_writable(pages[0], 0)) << "nothing of it is kept any more";
  rig.pool.release_all(pages);
  EXPECT_EQ(rig.pool.num_idle(), 1);
  rig.cache(ascending(3));
  EXPECT_EQ(rig.index.num_pages(), 1) << "half of what is there needs no page";
  EXPECT_EQ(rig.num_found(ascending(4)), 4);
}

TEST(PrefixIndex, EvictsTheLeastRecentlyUsedLeafFirst) {
  Rig rig(6);
  const std::vector<int32_t> old = rig.cache(ascending(8));
  rig.cache({1, 2, 3, 4, 9, 9, 9, 9});  // uses the first page anew
  rig.cache({7, 7, 7, 7});
  rig.pool.add_reference(old[0]);  // in use: it stays, and only leaves that are idle go
  rig.index.make_free(3);
  EXPECT_EQ(rig.num_found(ascending(8)), 4);
  EXPECT_EQ(rig.num_found({1, 2, 3, 4, 9, 9, 9, 9}), 8);
  rig.index.make_free(4);
  EXPECT_EQ(rig.num_found({1, 2, 3, 4, 9, 9, 9, 9}), 4);
  EXPECT_EQ(rig.num_found({7, 7, 7, 7}), 4);
  rig.index.make_free(5);
  EXPECT_EQ(rig.index.num_pages(), 1);
  EXPECT_THROW(rig.index.make_free(6), Error);
  EXPECT_NO_THROW(rig.index.check());
  rig.pool.release(old[0]);
  rig.index.make_free(6);
  EXPECT_EQ(rig.index.num_pages(), 0);
}

TEST(PrefixIndex, RefusesToChangeWeightsUnderPagesInUse) {
  Rig rig;
  std::vector<int32_t> pages;
  ASSERT_TRUE(rig.pool.try_allocate(1, pages));
  rig.index.insert(0, ascending(4), 0, pages);
  EXPECT_THROW(rig.index.begin_version(1), Error);
}

// Sequences come, share what is found, grow, file and go, against a list of all that was filed.
TEST(PrefixIndex, HoldsWhatItPromisesOverRandomUse) {
  for (uint32_t seed = 0; seed < 100; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    Rig rig(static_cast<int32_t>(8 + random() % 40));
    std::map<int32_t, Tokens> contents;  // page: tokens of its whole path, as filed or found last
    struct Live {
      Tokens tokens;
      std::vector<int32_t> pages;
    };
    std::vector<Live> live;
    for (int round = 0; round < 200; ++round) {
      if (live.size() < 3) {
        Live next;
        for (size_t count = 1 + random() % 14; count > 0; --count) {
          next.tokens.push_back(static_cast<int32_t>(random() % 2));
        }
        const PrefixIndex::Match match = rig.index.find(0, next.tokens);
        ASSERT_EQ(match.pages.size(), static_cast<size_t>(match.num_tokens + 3) / kPageTokens);
        for (size_t i = 0; i < match.pages.size(); ++i) {
          // Whatever is found was computed from just these tokens.
          const Tokens& content = contents.at(match.pages[i]);
          const size_t end = std::min<size_t>(match.num_tokens, (i + 1) * kPageTokens);
          ASSERT_GE(content.size(), end);
          ASSERT_TRUE(std::equal(content.begin(), content.begin() + static_cast<ptrdiff_t>(end),
                                 next.tokens.begin()));
        }
        const int32_t num_whole = match.num_tokens / kPageTokens;
        for (int32_t i = 0; i < num_whole; ++i) {
          rig.pool.add_reference(match.pages[i]);
          next.pages.push_back(match.pages[i]);
        }
        const auto num_pages = static_cast<int32_t>(next.tokens.size() + 3) / kPageTokens;
        const int32_t num_more = num_pages - num_whole;
        if (num_more > rig.pool.num_available()) {
          rig.pool.release_all(next.pages);
        } else {
          rig.index.make_free(num_more);
          ASSERT_TRUE(rig.pool.try_allocate(num_more, next.pages));
          rig.index.insert(0, next.tokens, num_whole, next.pages);
          for (size_t i = 0; i < next.pages.size(); ++i) {
            const size_t end = std::min(next.tokens.size(), (i + 1) * kPageTokens);
            if (!rig.pool.is_kept(next.pages[i])) continue;
            contents[next.pages[i]].assign(next.tokens.begin(),
                                           next.tokens.begin() + static_cast<ptrdiff_t>(end));
          }
          live.push_back(std::move(next));
        }
      }
      if (!live.empty() && random() % 2 == 0) {
        const size_t i = random() % live.size();
        rig.pool.release_all(live[i].pages);
        live.erase(live.begin() + static_cast<ptrdiff_t>(i));
      }
      ASSERT_NO_THROW(rig.index.check());
      ASSERT_LE(rig.index.num_pages(), rig.pool.num_pages());
    }
  }
}

}  // namespace
}  // namespace rollpack::rollout
