#include "rollout/speculation/acceptance.h"

#include <gtest/gtest.h>

namespace rollpack::rollout {
namespace {

TEST(Acceptance, DraftsThatNeverComeTrueAreSoonRare) {
  Acceptance acceptance;
  int num_drafts = 0;
  for (int step = 0; step < 1000; ++step) {
    if (acceptance.is_due(1)) {
      acceptance.learn(0, 5);
      ++num_drafts;
    } else {
      acceptance.skip();
    }
  }
  // Nineteen to find out (0.6 * 0.875^19 < 0.05), then one in 65 steps.
  EXPECT_EQ(num_drafts, 19 + (1000 - 19) / 65);
}

TEST(Acceptance, OneGoodDraftBringsThemBack) {
  Acceptance acceptance;
  for (int i = 0; i < 100; ++i) acceptance.learn(0, 5);
  EXPECT_FALSE(acceptance.is_due(1));
  acceptance.learn(5, 5);
  EXPECT_TRUE(acceptance.is_due(1));
}

TEST(Acceptance, ASmallShareIsWorthItForOneSequenceAndNotForEight) {
  Acceptance acceptance;
  for (int i = 0; i < 400; ++i) acceptance.learn(i % 2, 2);
  EXPECT_TRUE(acceptance.is_due(1));
  EXPECT_TRUE(acceptance.is_due(2));
  EXPECT_FALSE(acceptance.is_due(8));
}

TEST(Acceptance, ADueDraftStaysDueUntilItIsMade) {
  Acceptance acceptance;
  for (int i = 0; i < 100; ++i) acceptance.learn(0, 5);
  for (int i = 0; i < Acceptance::kProbeInterval; ++i) {
    EXPECT_FALSE(acceptance.is_due(1));
    acceptance.skip();
  }
  EXPECT_TRUE(acceptance.is_due(1));
  acceptance.skip();
  EXPECT_TRUE(acceptance.is_due(1));
}

}  // namespace
}  // namespace rollpack::rollout
