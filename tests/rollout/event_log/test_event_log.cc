#include "rollout/event_log/event_log.h"

#include <gtest/gtest.h>
#include <spdlog/details/log_msg.h>

#include <chrono>
#include <cstdlib>
#include <string>

#include "tests/error_text.h"

namespace rollpack::rollout {
namespace {

std::string line_of(bool is_json, spdlog::level::level_enum level, const std::string& text) {
  const auto time = spdlog::log_clock::time_point(std::chrono::milliseconds(1700000000007));
  const spdlog::details::log_msg message(time, {}, "rollpack", level, text);
  spdlog::memory_buf_t line;
  EventFormatter(is_json, 3).clone()->format(message, line);
  return {line.data(), line.size()};
}

TEST(EventLog, TextHasTimeLevelRankAndOneLine) {
  ::setenv("TZ", "UTC", 1);
  ::tzset();
  EXPECT_EQ(line_of(false, spdlog::level::info, "a {} \xc3\xa4"),
            "2023-11-14 22:13:20.007 info rank=3 a {} \xc3\xa4\n");
  EXPECT_EQ(line_of(false, spdlog::level::warn, "two\nlines\t\x1b[2J"),
            "2023-11-14 22:13:20.007 warn rank=3 two\\nlines  [2J\n");
}

TEST(EventLog, JsonIsOneObjectALineWhateverItQuotes) {
  EXPECT_EQ(line_of(true, spdlog::level::err, "a \"b\"\n\xff"),
            "{\"time\":\"2023-11-14T22:13:20.007Z\",\"level\":\"error\",\"rank\":3,"
            "\"message\":\"a \\\"b\\\"\\n\xef\xbf\xbd\"}\n");
}

TEST(EventLog, AVariableThatIsNoLevelIsNamed) {
  ::setenv("ROLLPACK_LOG_LEVEL", "loud", 1);
  EXPECT_EQ(testing::error_text(start_log),
            "invalid_argument: ROLLPACK_LOG_LEVEL = loud (environment): expected one of debug, "
            "info, warn, error, off");
  ::unsetenv("ROLLPACK_LOG_LEVEL");
}

}  // namespace
}  // namespace rollpack::rollout
