#include "kernels/base/fault_point.h"

#include <gtest/gtest.h>
#include <signal.h>

#include <cstdlib>
#include <string>

#include "tests/error_text.h"

namespace rollpack {
namespace {

using rollpack::testing::error_text;
using ::testing::ExitedWithCode;
using ::testing::KilledBySignal;

// Runs in a child: arms `faults` as `rank`, visits a point `num_visits` times, and says how often
// it was to leave something out.
[[noreturn]] void visit(const char* faults, int rank, int num_visits,
                        FaultPoint point = FaultPoint::kStepBegun) {
  ::setenv("ROLLPACK_FAULT", faults, 1);
  arm_faults(rank);
  int num_skipped = 0;
  for (int i = 0; i < num_visits; ++i) num_skipped += fault_at(point) ? 1 : 0;
  std::_Exit(10 + num_skipped);
}

TEST(FaultPointDeathTest, DiesAsItIsToldAtTheVisitThatCounts) {
  EXPECT_EXIT(visit("step_begun:3:kill", 1, 3), KilledBySignal(SIGKILL), "");
  EXPECT_EXIT(visit("step_begun:3:kill", 1, 2), ExitedWithCode(10), "");
  EXPECT_EXIT(visit("step_begun:1:segv", 1, 1), KilledBySignal(SIGSEGV), "");
  EXPECT_EXIT(visit("step_begun:1:abort", 1, 1), KilledBySignal(SIGABRT), "");
  EXPECT_EXIT(visit("step_begun:1:exit", 1, 1), ExitedWithCode(0), "");
}

TEST(FaultPointDeathTest, LeavesOutWhatItIsToldTo) {
  EXPECT_EXIT(visit("step_begun:2:skip", 1, 5), ExitedWithCode(11), "");
  EXPECT_EXIT(visit("step_begun:0:skip", 1, 5), ExitedWithCode(15), "");
  EXPECT_EXIT(visit("step_begun:0:skip", 1, 5, FaultPoint::kLayerRun), ExitedWithCode(10), "");
}

TEST(FaultPointDeathTest, HoldsForTheRankItNamesOrForAllButTheFirst) {
  EXPECT_EXIT(visit("step_begun:1:kill", 0, 1), ExitedWithCode(10), "");
  EXPECT_EXIT(visit("step_begun:1:kill@0", 0, 1), KilledBySignal(SIGKILL), "");
  EXPECT_EXIT(visit("step_begun:1:kill@2", 1, 1), ExitedWithCode(10), "");
  EXPECT_EXIT(visit("layer_run:1:kill@1,step_begun:1:kill@2", 2, 1), KilledBySignal(SIGKILL), "");
}

TEST(FaultPointDeathTest, EveryPointHasItsName) {
  const char* names[] = {
      "worker_connected", "worker_loaded",    "groups_taken",   "step_begun",    "layer_run",
      "step_computed",    "sample_cut_off",   "sample_sent",    "weights_begun", "weights_staged",
      "weights_checked",  "weights_switched", "worker_given_up"};
  ASSERT_EQ(std::size(names), static_cast<size_t>(FaultPoint::kCount));
  for (size_t i = 0; i < std::size(names); ++i) {
    const std::string faults = std::string(names[i]) + ":1:exit";
    EXPECT_EXIT(visit(faults.c_str(), 1, 1, static_cast<FaultPoint>(i)), ExitedWithCode(0), "")
        << names[i];
  }
}

TEST(FaultPoint, CostsNothingAndDoesNothingUnlessItIsArmed) {
  ::unsetenv("ROLLPACK_FAULT");
  arm_faults(1);
  EXPECT_FALSE(is_fault_armed(FaultPoint::kStepBegun));
  EXPECT_FALSE(fault_at(FaultPoint::kStepBegun));
}

TEST(FaultPoint, RefusesWhatItDoesNotKnow) {
  const auto refusal = [](const char* faults) {
    ::setenv("ROLLPACK_FAULT", faults, 1);
    const std::string text = error_text([] { arm_faults(1); });
    ::unsetenv("ROLLPACK_FAULT");
    return text;
  };
  EXPECT_EQ(refusal("nowhere:1:kill").substr(0, 70),
            "invalid_argument: ROLLPACK_FAULT = nowhere:1:kill: expected a point of");
  EXPECT_EQ(
      refusal("step_begun:1:die"),
      "invalid_argument: ROLLPACK_FAULT = step_begun:1:die: expected an action of kill, segv, "
      "abort, exit, stop, skip; it is for tests; unset it");
  for (const char* faults : {"step_begun:x:kill", "step_begun:-1:kill", "step_begun:1:kill@two",
                             "step_begun::kill", "step_begun:1x:kill"}) {
    EXPECT_NE(refusal(faults).find("count and rank as numbers"), std::string::npos) << faults;
  }
}

}  // namespace
}  // namespace rollpack
