#include "rollout/event_log/event_log.h"

#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <initializer_list>
#include <optional>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <nlohmann/json.hpp>

namespace rollpack::rollout {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kLevelVariable = "ROLLPACK_LOG_LEVEL";
constexpr const char* kFormatVariable = "ROLLPACK_LOG_FORMAT";

// Of this process; set while it has one thread.
struct Settings {
  std::optional<std::string> level, format;  // of the environment
  bool is_json = false;
  int rank = 0;
};

Settings& settings() {
  static Settings of_process;
  return of_process;
}

std::optional<std::string> variable(const char* name,
                                    std::initializer_list<std::string_view> choices) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  for (const std::string_view choice : choices) {
    if (value == choice) return value;
  }
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = name,
               .value = value,
               .origin = "environment",
               .allowed = fmt::format("one of {}", fmt::join(choices, ", "))});
}

void apply_format() {
  spdlog::set_formatter(std::make_unique<EventFormatter>(settings().is_json, settings().rank));
}

struct Moment {
  std::tm parts{};
  int64_t milliseconds = 0;
};

Moment moment_of(spdlog::log_clock::time_point time, bool is_utc) {
  const std::time_t seconds = spdlog::log_clock::to_time_t(time);
  Moment moment;
  is_utc ? ::gmtime_r(&seconds, &moment.parts) : ::localtime_r(&seconds, &moment.parts);
  moment.milliseconds =
      std::chrono::duration_cast<std::chrono::milliseconds>(time.time_since_epoch()).count() % 1000;
  return moment;
}

std::string date_and_time(const std::tm& t, char between) {
  return fmt::format("{:04}-{:02}-{:02}{}{:02}:{:02}:{:02}", t.tm_year + 1900, t.tm_mon + 1,
                     t.tm_mday, between, t.tm_hour, t.tm_min, t.tm_sec);
}

// An event is one line, whatever it quotes.
void append_in_one_line(std::string_view text, spdlog::memory_buf_t& line) {
  for (const char c : text) {
    if (c == '\n') {
      line.append(std::string_view("\\n"));
    } else {
      line.push_back(static_cast<unsigned char>(c) < 32 ? ' ' : c);
    }
  }
}

std::string json_event(spdlog::log_clock::time_point time, std::string_view level, int rank,
                       std::string_view message, std::string_view name = {}, Json value = {}) {
  const Moment moment = moment_of(time, /*is_utc=*/true);
  Json event = {
      {"time", fmt::format("{}.{:03}Z", date_and_time(moment.parts, 'T'), moment.milliseconds)},
      {"level", level},
      {"rank", rank},
      {"message", message}};
  if (!name.empty()) event[std::string(name)] = std::move(value);
  return event.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace

void EventFormatter::format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& line) {
  const spdlog::string_view_t level = spdlog::level::to_string_view(message.level);
  // spdlog says "warning", which is longer than the key that asks for it.
  const std::string_view name = message.level == spdlog::level::warn
                                    ? std::string_view("warn")
                                    : std::string_view(level.data(), level.size());
  const std::string_view text(message.payload.data(), message.payload.size());
  if (is_json_) {
    const std::string event = json_event(message.time, name, rank_, text);
    line.append(event.data(), event.data() + event.size());
    return;
  }
  const Moment moment = moment_of(message.time, /*is_utc=*/false);
  fmt::format_to(std::back_inserter(line), "{}.{:03} {} rank={} ", date_and_time(moment.parts, ' '),
                 moment.milliseconds, name, rank_);
  append_in_one_line(text, line);
  line.push_back('\n');
}

std::unique_ptr<spdlog::formatter> EventFormatter::clone() const {
  return std::make_unique<EventFormatter>(is_json_, rank_);
}

void start_log() {
  spdlog::set_default_logger(std::make_shared<spdlog::logger>(
      "rollpack", std::make_shared<spdlog::sinks::stderr_sink_mt>()));
  Settings& ours = settings();
  if (const char* rank = std::getenv("OMPI_COMM_WORLD_RANK")) ours.rank = std::atoi(rank);
  apply_format();
  ours.level = variable(kLevelVariable, {"debug", "info", "warn", "error", "off"});
  ours.format = variable(kFormatVariable, {"text", "json"});
  configure_log({});
}

void configure_log(const LogOptions& options) {
  Settings& ours = settings();
  ours.is_json = ours.format.value_or(options.format) == "json";
  apply_format();
  spdlog::set_level(spdlog::level::from_str(ours.level.value_or(options.level)));
}

void set_log_rank(int rank) {
  settings().rank = rank;
  apply_format();
}

bool log_is_json() {
  return settings().is_json;
}

void log_end(const ErrorInfo& error) {
  std::fflush(stdout);
  const std::string text = fmt::format("{}: {}", error_code_name(error.code), format_error(error));
  if (!log_is_json()) return fmt::print(stderr, "rollpack: {}\n", text);
  fmt::print(stderr, "{}", json_event(spdlog::log_clock::now(), "error", settings().rank, text));
}

void log_document(std::string_view message, const std::string& json, const std::string& text) {
  if (!spdlog::should_log(spdlog::level::info)) return;
  if (!log_is_json()) return fmt::print(stderr, "{}", text);
  fmt::print(stderr, "{}",
             json_event(spdlog::log_clock::now(), "info", settings().rank, message, message,
                        Json::parse(json)));
}

}  // namespace rollpack::rollout
