#include "rollout/metrics/top_screen.h"

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <utility>

#include "rollout/metrics/metric_table.h"
#include "tests/error_text.h"
#include "tests/rollout/metrics/numbers.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;

Snapshot busy_snapshot() {
  Snapshot snapshot;
  snapshot.values = {{"num_running_seqs", 1234567},
                     {"num_waiting", 8},
                     {"num_preempted_seqs", 2},
                     {"kv_cache_usage", 0.25},
                     {"num_kv_pages", 400},
                     {"num_kv_pages_used", 100},
                     {"num_slots", 4},
                     {"slot_usage", 1},
                     {"num_samples_stop", 3},
                     {"num_tokens_delivered", 60},
                     {"num_pads_avoided", 40},
                     {"prefix_cache_queries", 10},
                     {"prefix_cache_hits", 5},
                     {"generation_tokens_per_s", 999.6}};
  snapshot.batch_waits.add(2s);
  snapshot.batch_waits.add(1s);
  for (int32_t rank = 0; rank < 40; ++rank) {
    snapshot.workers.push_back({.rank = rank,
                                .silence_s = rank == 33 ? 12.25 : 0,
                                .values = numbers({{"num_tokens_generated", 100.0 * rank}})});
  }
  return snapshot;
}

// What the server writes is what top reads.
Scrape busy() {
  return parse_metrics(
      metrics_text(metric_families(busy_snapshot(), {.is_well = true},
                                   {.model_name = "a\\n\"b\"\n", .dtype = "f", .batching = "c"})));
}

bool holds(const std::vector<std::string>& lines, const std::string& text) {
  for (const std::string& line : lines) {
    if (line.find(text) != std::string::npos) return true;
  }
  return false;
}

TEST(Scrape, ReadsBackWhatTheTableWrites) {
  const Scrape scrape = busy();
  EXPECT_EQ(scrape.get("num_requests_running"), 1234567);
  EXPECT_EQ(scrape.get("request_success_total{finished_reason=\"stop\"}"), 3);
  EXPECT_EQ(scrape.get("batch_wait_seconds_bucket{le=\"+Inf\"}"), 2);
  EXPECT_FALSE(scrape.find("rollout_probs_diff_mean"));
  EXPECT_EQ(scrape.info.at("model_name"), "a\\n\"b\"\n");
  EXPECT_EQ(scrape.ranks.size(), 40u);
  EXPECT_EQ(scrape.ranks.at(33).at("seconds_without_progress"), 12.25);
}

TEST(Scrape, PassesOverOtherNamesAndRefusesWhatIsNoMetric) {
  EXPECT_TRUE(parse_metrics("# a comment\n\npython_info 1\n").values.empty());
  for (const char* bad : {"rollpack:a", "rollpack:a x\n", "rollpack:a{b=\"c} 1\n", "<html>\n",
                          "rollpack:a{b} 1\n", "rollpack:a \n"}) {
    EXPECT_NE(testing::error_text([&] { parse_metrics(bad); }).find("data_loss: metrics"),
              std::string::npos)
        << bad;
  }
}

TEST(Scrape, APortWithoutAServerIsNamed) {
  EXPECT_EQ(testing::error_text([] { scrape(1, 1000ms); }),
            "unavailable: port = 1: expected the metrics.port of a serving job on this machine; "
            "Connection refused");
}

TEST(TopScreen, SaysWhatTheMetricsSay) {
  Scrape scrape = busy();
  scrape.status = "stuck";
  scrape.message = "a rank\nis silent";
  const auto lines = top_screen(scrape, nullptr, 9400, {.num_lines = 100, .num_columns = 200});
  EXPECT_EQ(lines[0], "rollpack top  127.0.0.1:9400  a\\n\"b\"   f  c  stuck: a rank is silent");
  for (const char* text : {"1,000 sampled", "1,234,567 running  8 waiting (2 preempted)", "3 stop",
                           "[#####...............]   25%  100 of 400", "prefix hits 50%",
                           "[####################]  100%", "1.50 s on average",
                           "40 avoided (40% of rows)", "has reported no probabilities"}) {
    EXPECT_TRUE(holds(lines, text)) << text;
  }
  EXPECT_FALSE(holds(lines, "more"));
}

TEST(TopScreen, FitsTheTerminalWithTheSilentRanksFirst) {
  Scrape before = busy(), now = busy();
  before.time = {};
  now.time = before.time + 2s;
  now.ranks[33]["generation_tokens_total"] += 500;
  for (size_t num_lines = 1; num_lines < 60; ++num_lines) {
    for (const size_t num_columns : {1u, 40u, 100u}) {
      const auto lines = top_screen(now, &before, 1, {num_lines, num_columns});
      EXPECT_LE(lines.size(), num_lines);
      for (const std::string& line : lines) EXPECT_LE(line.size(), num_columns);
    }
  }
  const auto lines = top_screen(now, &before, 1, {.num_lines = 16, .num_columns = 100});
  ASSERT_EQ(lines.size(), 16u);
  EXPECT_EQ(lines[12].substr(0, 6), "    33");
  EXPECT_NE(lines[12].find("3,800"), std::string::npos) << lines[12];
  EXPECT_NE(lines[12].find(" 250 "), std::string::npos) << lines[12];
  EXPECT_NE(lines[12].find("12.2 s"), std::string::npos) << lines[12];
  EXPECT_EQ(lines[13].substr(0, 6), "     0");
  EXPECT_EQ(lines[15], "   and 37 more");
}

}  // namespace
}  // namespace rollpack::rollout
