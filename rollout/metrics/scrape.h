// One reading of a serving job's /metrics and /health, as `rollpack top` takes it.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>

namespace rollpack::rollout {

struct Scrape {
  std::chrono::steady_clock::time_point time;
  // Without the prefix `rollpack:`; labels other than a rank's stand behind the name, as written:
  // request_success_total{finished_reason="stop"}.
  std::map<std::string, double> values;
  std::map<int32_t, std::map<std::string, double>> ranks;  // rank_NAME{rank} by rank and NAME
  std::map<std::string, std::string> info;                 // the labels of `info`
  std::string status;                                      // of /health
  std::string message;

  std::optional<double> find(const std::string& name) const {
    const auto found = values.find(name);
    return found == values.end() ? std::nullopt : std::optional(found->second);
  }
  double get(const std::string& name) const { return find(name).value_or(0); }
};

// Reads Prometheus' text format; names without our prefix are passed over.
// Errors: data_loss naming the line that is none of it.
Scrape parse_metrics(std::string_view text);

// Asks 127.0.0.1:port. Errors: unavailable, data_loss, naming the port.
Scrape scrape(int port, std::chrono::milliseconds timeout);

}  // namespace rollpack::rollout
