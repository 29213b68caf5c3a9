#include "rollout/metrics/metric_table.h"

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "rollout/metrics/throughput.h"
#include "tests/rollout/metrics/numbers.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;

std::string text_of(const Snapshot& snapshot, bool is_well = true) {
  return metrics_text(metric_families(snapshot, {.is_well = is_well}, {.model_name = "a\"b"}));
}

TEST(MetricTable, EveryFamilyComesOnceAndIsExplained) {
  std::set<std::string> names;
  for (const auto& family : metric_families({}, {}, {})) {
    EXPECT_TRUE(names.insert(family.name).second) << family.name;
    EXPECT_FALSE(family.help.empty()) << family.name;
    EXPECT_EQ(family.name.substr(0, 9), "rollpack:");
    const bool is_counter = family.type == prometheus::MetricType::Counter;
    EXPECT_EQ(family.name.ends_with("_total"), is_counter) << family.name;
  }
  EXPECT_GT(names.size(), 30u);
}

TEST(MetricTable, AnUnknownCounterIsZeroAndAnUnknownGaugeIsAbsent) {
  const std::string text = text_of({});
  EXPECT_NE(text.find("\nrollpack:worker_deaths_total 0\n"), std::string::npos) << text;
  EXPECT_EQ(text.find("rollout_probs_diff_mean"), std::string::npos);
  EXPECT_EQ(text.find("num_requests_running"), text.find("rank_num_requests_running") + 5);
}

TEST(MetricTable, NumbersLabelsRanksAndHealthAreWritten) {
  Snapshot snapshot;
  snapshot.values = {
      {"num_running_seqs", 3}, {"num_samples_length", 1e15}, {"num_samples_straight_to_nodes", 4}};
  snapshot.workers = {
      {.rank = 0, .values = numbers({{"num_kv_pages", 8}, {"num_kv_pages_used", 2}})},
      {.rank = 7, .silence_s = 1.5}};
  const std::string text = text_of(snapshot, false);
  for (const char* line :
       {"rollpack:num_requests_running 3",
        "rollpack:request_success_total{finished_reason=\"length\"} 1000000000000000",
        "rollpack:node_samples_total{way=\"straight\"} 4",
        "rollpack:rank_kv_cache_usage_perc{rank=\"0\"} 0.25",
        "rollpack:rank_kv_cache_usage_perc{rank=\"7\"} 0",
        "rollpack:rank_seconds_without_progress{rank=\"7\"} 1.5", "rollpack:healthy 0",
        "rollpack:info{model_name=\"a\\\"b\",dtype=\"\",batching=\"\"} 1"}) {
    EXPECT_NE(text.find(std::string("\n") + line + "\n"), std::string::npos) << line << text;
  }
}

TEST(MetricTable, WaitsAreCountedUpToAndIncludingEachBound) {
  Snapshot snapshot;
  for (const auto wait : {0ms, 1ms, 2ms, 100ms, 101ms, 200000ms}) snapshot.batch_waits.add(wait);
  const std::string text = text_of(snapshot);
  for (const char* line : {"bucket{le=\"0.001\"} 2", "bucket{le=\"0.003\"} 3",
                           "bucket{le=\"0.1\"} 4", "bucket{le=\"0.3\"} 5", "bucket{le=\"100\"} 5",
                           "bucket{le=\"+Inf\"} 6", "count 6", "sum 200.204"}) {
    EXPECT_NE(text.find(std::string("\nrollpack:batch_wait_seconds_") + line + "\n"),
              std::string::npos)
        << line << text;
  }
}

TEST(Throughput, IsTheRiseOfTheLastFiveSeconds) {
  const std::chrono::steady_clock::time_point start{};
  Throughput tokens;
  EXPECT_EQ(tokens.add(start, 100), 0);  // since when is not known
  EXPECT_EQ(tokens.add(start + 1s, 150), 50);
  EXPECT_EQ(tokens.add(start + 2s, 150), 25);
  for (int s = 3; s <= 6; ++s) tokens.add(start + std::chrono::seconds(s), 150);
  EXPECT_EQ(tokens.add(start + 7s, 200), 10);
  EXPECT_EQ(tokens.add(start + 8s, 0), 0);  // a counter that fell is no rate
}

}  // namespace
}  // namespace rollpack::rollout
