#include "rollout/speculation/acceptance.h"

#include <gtest/gtest.h>

namespace rollpack::rollout {
namespace {

TEST(Acceptance, DraftsThatNeverComeTrueAreSoonRare) {
  Acceptance acceptance;
  int num_drafts = 0;
  for (int step = 0; step < 1000; ++step) {
    if (acceptance.is_due()) {
      acceptance.learn(0);
      ++num_drafts;
    } else {
      acceptance.skip();
    }
  }
  // Thirteen to find out (0.875^13 < 0.2), then one in 33 steps.
  EXPECT_EQ(num_drafts, 13 + (1000 - 13) / 33);
}

TEST(Acceptance, OneGoodDraftBringsThemBack) {
  Acceptance acceptance;
  for (int i = 0; i < 100; ++i) acceptance.learn(0);
  EXPECT_FALSE(acceptance.is_due());
  acceptance.learn(2);
  EXPECT_TRUE(acceptance.is_due());
}

TEST(Acceptance, AFewAcceptedTokensKeepThemGoing) {
  Acceptance acceptance;
  for (int i = 0; i < 400; ++i) {
    EXPECT_TRUE(acceptance.is_due()) << "draft " << i;
    acceptance.learn(i % 3 == 0 ? 1 : 0);
  }
}

TEST(Acceptance, ADueDraftStaysDueUntilItIsMade) {
  Acceptance acceptance;
  for (int i = 0; i < 100; ++i) acceptance.learn(0);
  for (int i = 0; i < Acceptance::kProbeInterval; ++i) {
    EXPECT_FALSE(acceptance.is_due());
    acceptance.skip();
  }
  EXPECT_TRUE(acceptance.is_due());
  acceptance.skip();
  EXPECT_TRUE(acceptance.is_due());
}

}  // namespace
}  // namespace rollpack::rollout
