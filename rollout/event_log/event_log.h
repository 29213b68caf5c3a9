// The log of a process: one line an event on stderr, through spdlog. Every line says when, how
// grave, which rank, what; as text, or as one JSON object. Prompts and responses are never logged.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <string_view>

#include <spdlog/formatter.h>

#include "kernels/base/error.h"

namespace rollpack::rollout {

struct LogOptions {
  std::string level = "info";   // debug, info, warn, error or off
  std::string format = "text";  // text or json
};

// Starts the log of this process, as the environment says: ROLLPACK_LOG_LEVEL, ROLLPACK_LOG_FORMAT.
// The rank is mpirun's until set_log_rank().
// Errors: invalid_argument naming the variable.
void start_log();
// As `options` say; a variable that is set wins over them.
void configure_log(const LogOptions& options);
void set_log_rank(int rank);
bool log_is_json();

// The last word of a command that failed: "rollpack: CODE: TEXT", or an event of a JSON log.
void log_end(const ErrorInfo& error);
// Says `json`, an object, at level info under `message`; as text it is what `text` says, as it is.
void log_document(std::string_view message, const std::string& json, const std::string& text);

// How an event becomes a line. Public for tests.
class EventFormatter final : public spdlog::formatter {
 public:
  EventFormatter(bool is_json, int rank) : is_json_(is_json), rank_(rank) {}

  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& line) override;
  std::unique_ptr<spdlog::formatter> clone() const override;

 private:
  bool is_json_;
  int rank_;
};

}  // namespace rollpack::rollout
