#include "rollout/speculation/draft_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <random>

namespace rollpack::rollout {
namespace {

using Ids = std::vector<int32_t>;

Ids propose(DraftIndex& index, int32_t sample_index, int32_t max_tokens = 100) {
  Ids draft = {-7};  // is overwritten
  index.propose(sample_index, max_tokens, draft);
  return draft;
}

TEST(DraftIndex, ProposesWhatFollowedInThePrompt) {
  DraftIndex index(Ids{1, 2, 3, 4, 5, 6, 7, 8});
  index.extend(0, Ids{9, 2, 3, 4});
  EXPECT_EQ(propose(index, 0), (Ids{5, 6, 7})) << "no more than have matched";
  EXPECT_EQ(propose(index, 0, 2), (Ids{5, 6}));
  EXPECT_EQ(propose(index, 0, 0), Ids{});
}

TEST(DraftIndex, ProposesWhatASiblingSaid) {
  DraftIndex index(Ids{1, 2});
  index.extend(0, Ids{3, 4, 5, 6, 7, 8, 9});
  index.extend(4, Ids{3, 4});
  EXPECT_EQ(propose(index, 4), (Ids{5, 6, 7, 8})) << "two of the prompt match as well";
  EXPECT_EQ(propose(index, 0), Ids{}) << "nobody has said more";
  index.extend(0, Ids{3, 4, 5, 6, 7, 8, 9, 10});
  index.extend(4, Ids{3, 4, 5, 6, 7, 8, 9});
  EXPECT_EQ(propose(index, 4), Ids{10}) << "a text that still grows";
}

TEST(DraftIndex, TwoTokensMustMatch) {
  DraftIndex index(Ids{1, 2, 3, 4, 5});
  index.extend(0, Ids{9, 3});
  EXPECT_EQ(propose(index, 0), Ids{});
  index.extend(0, Ids{9, 3, 4});
  EXPECT_EQ(propose(index, 0, 1), Ids{5});
  DraftIndex tiny(Ids{1});
  tiny.extend(0, Ids{1});
  EXPECT_EQ(propose(tiny, 0), Ids{}) << "the only match is the text's own end";
  EXPECT_EQ(propose(tiny, 3), Ids{}) << "no such text";
}

TEST(DraftIndex, TheLongestMatchWinsAndOfEqualOnesTheNewest) {
  DraftIndex index(Ids{50, 1, 2, 3, 10, 60, 1, 2, 3, 11, 0});
  index.extend(0, Ids{50, 1, 2, 3});
  EXPECT_EQ(propose(index, 0, 1), Ids{10});
  index.extend(1, Ids{70, 1, 2, 3});
  EXPECT_EQ(propose(index, 1, 1), Ids{11});
}

TEST(DraftIndex, ALoopGoesRound) {
  DraftIndex index(Ids{100});
  Ids text = {7, 8, 9, 7, 8, 9};
  index.extend(0, text);
  EXPECT_EQ(propose(index, 0), (Ids{7, 8, 9}));
  text.insert(text.end(), {7, 8});
  index.extend(0, text);
  EXPECT_EQ(propose(index, 0), (Ids{9, 7, 8, 9, 7}));
  DraftIndex behind(Ids{1, 2, 3});
  behind.extend(0, Ids{1, 2});
  EXPECT_EQ(propose(behind, 0, 9), (Ids{3, 1})) << "from the prompt on into the response";
  DraftIndex same(Ids{5});
  same.extend(0, Ids(50, 5));
  EXPECT_EQ(propose(same, 0), Ids(32, 5)) << "matches count to kMaxMatch";
}

// The longest match of all earlier places, found by comparing with each of them.
int32_t longest_match(const std::vector<Ids>& texts, const Ids& own) {
  size_t best = 0;
  for (const Ids& text : texts) {
    for (size_t end = 1; end < text.size(); ++end) {  // something must follow
      size_t length = 0;
      while (length < std::min(end, own.size()) &&
             text[end - 1 - length] == own[own.size() - 1 - length]) {
        ++length;
      }
      best = std::max(best, length);
    }
  }
  return static_cast<int32_t>(best);
}

TEST(DraftIndex, FindsTheLongestMatchOfRandomTexts) {
  int num_found = 0, num_missed = 0;
  for (uint32_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    // Few places a gram (40^2 of them), so that the newest candidates are all there are.
    const auto letter = [&] { return static_cast<int32_t>(random() % 40); };
    Ids prompt(1 + random() % 40);
    std::ranges::generate(prompt, letter);
    DraftIndex index(prompt);
    std::vector<Ids> texts = {prompt, prompt, prompt, prompt};  // each sample behind the prompt
    for (int step = 0; step < 120; ++step) {
      const size_t own = 1 + random() % 3;
      // Long copies from anywhere make long matches.
      const Ids& other = texts[random() % texts.size()];
      const size_t at = random() % other.size();
      Ids piece(other.begin() + static_cast<ptrdiff_t>(at),
                other.begin() + static_cast<ptrdiff_t>(std::min(other.size(), at + random() % 6)));
      piece.push_back(letter());
      texts[own].insert(texts[own].end(), piece.begin(), piece.end());
      index.extend(
          static_cast<int32_t>(own) - 1,
          Ids(texts[own].begin() + static_cast<ptrdiff_t>(prompt.size()), texts[own].end()));
      const Ids draft = propose(index, static_cast<int32_t>(own) - 1);
      const int32_t longest = longest_match(texts, texts[own]);
      if (longest < DraftIndex::kGram) {
        EXPECT_TRUE(draft.empty());
      } else if (longest < 6) {  // longer ones may reach beyond what stands for the prompt's end
        EXPECT_LE(draft.size(), static_cast<size_t>(longest));
        ++(draft.empty() ? num_missed : num_found);
      }
    }
  }
  EXPECT_GT(num_found, 1000);
  EXPECT_LT(num_missed, num_found / 1000) << "one bucket may hold too many of two grams";
}

TEST(DraftIndex, ManyTokensCostLittleEachAndEndAtTheLimit) {
  std::mt19937 random(1);
  DraftIndex index(Ids{1, 2, 3});
  Ids text;
  // The worst case: all grams in one bucket.
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < DraftIndex::kMaxTokens + 10; i += 64) {
    text.insert(text.end(), 64, 5);
    index.extend(0, text);
    propose(index, 0, 5);
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  EXPECT_LT(seconds.count() / static_cast<double>(text.size()), 20e-6) << "s a token";
  EXPECT_EQ(index.num_tokens(), DraftIndex::kMaxTokens);
  EXPECT_EQ(propose(index, 0), Ids{}) << "the index is full";
}

}  // namespace
}  // namespace rollpack::rollout
