#include "rollout/metrics/health.h"

#include <gtest/gtest.h>

#include <chrono>
#include <functional>

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;
using TimePoint = std::chrono::steady_clock::time_point;

const TimePoint kNow = TimePoint(1000s);
const HealthLimits kLimits{.lease = 30s, .answer = 10s};

Snapshot serving() {
  return {.phase = ServingPhase::kServing,
          .time = kNow - 1s,
          .values = {{"num_workers", 2}, {"longest_silence_s", 29}, {"is_paused", 0}}};
}

TEST(Health, AServingJobIsWellUpToEachLimitAndNotBeyond) {
  struct Case {
    const char* status;
    std::function<void(Snapshot&)> change;
    const char* message = "";
  };
  const std::vector<Case> cases = {
      {"ok", [](Snapshot&) {}},
      {"paused", [](Snapshot& s) { s.values["is_paused"] = 1; }},
      {"asleep",
       [](Snapshot& s) {
         s.values["is_asleep"] = s.values["needs_weights"] = s.values["is_paused"] = 1;
       }},
      {"without_weights", [](Snapshot& s) { s.values["needs_weights"] = 1; },
       "sleep(level=2) has dropped them: send a whole update"},
      {"starting", [](Snapshot& s) { s.phase = ServingPhase::kStarting; }, "ranks are loading"},
      {"draining", [](Snapshot& s) { s.phase = ServingPhase::kDraining; }, "told to end"},
      {"broken",
       [](Snapshot& s) {
         s.phase = ServingPhase::kStarting;
         s.broken = ErrorInfo{.code = ErrorCode::kUnavailable, .field = "workers", .value = "none"};
       },
       "workers = none"},
      {"no_workers", [](Snapshot& s) { s.values["num_workers"] = 0; },
       "no rank takes part at present"},
      {"ok", [](Snapshot& s) { s.values["longest_silence_s"] = 30; }},
      {"stuck", [](Snapshot& s) { s.values["longest_silence_s"] = 30.5; },
       "a rank with work has shown no progress for 30.5 s; cluster.lease_s = 30"},
      {"ok", [](Snapshot& s) { s.time = kNow - 10s; }},
      {"unresponsive", [](Snapshot& s) { s.time = kNow - 10500ms; },
       "the dispatcher has not answered for 10.5 s"},
      {"ok", [](Snapshot& s) { s.bridge_asked = kNow - 10s; }},
      {"unresponsive", [](Snapshot& s) { s.bridge_asked = kNow - 11s; },
       "the bridge has not answered for 11.0 s"},
  };
  for (const Case& c : cases) {
    Snapshot snapshot = serving();
    c.change(snapshot);
    const Health health = health_of(snapshot, kNow, kLimits);
    EXPECT_EQ(health.status, c.status);
    EXPECT_EQ(health.message, c.message) << c.status;
    const std::set<std::string> well = {"ok", "paused", "asleep", "without_weights"};
    EXPECT_EQ(health.is_well, well.contains(health.status)) << c.status;
  }
}

TEST(Health, TheAnswerIsJsonThatQuotesWhatItIsToldAndSaysNothingOfTheUnknown) {
  Snapshot snapshot;
  EXPECT_EQ(health_json({false, "broken", "a \"name\"\n\xff"}, snapshot),
            "{\"status\":\"broken\",\"message\":\"a \\\"name\\\"\\n\xef\xbf\xbd\"}\n");
  snapshot.values = {{"num_workers", 2}, {"num_open_samples", 7}, {"weight_version", 3}};
  EXPECT_EQ(health_json({true, "ok", ""}, snapshot),
            "{\"status\":\"ok\",\"num_workers\":2,\"num_open_samples\":7,\"weight_version\":3}\n");
}

}  // namespace
}  // namespace rollpack::rollout
