#include "rollout/bench/comparison.h"

#include <array>

#include <fmt/format.h>

namespace rollpack::rollout {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::array kBaselines = {"left_padded", "length_sorted"};

std::string gain_key(const std::string& baseline) {
  return "over_" + baseline;
}

Json gain(const Pass& baseline, const Pass& pass) {
  const double ratio = baseline.wall_s / pass.wall_s;
  const double bound =
      static_cast<double>(baseline.tokens_computed()) / static_cast<double>(pass.tokens_computed());
  return {{"gain", ratio}, {"bound", bound}, {"share_of_bound", ratio / bound}};
}

}  // namespace

Json comparison_report(const ModePasses& modes, const BenchSetting& setting) {
  Json report = Json::array();
  for (const auto& [name, passes] : modes) {
    const Pass& best = best_of(passes);
    const PassMemory memory = memory_of(best, setting);
    Json line = {{"batching", name},
                 {"wall_s", best.wall_s},
                 {"tokens_computed", best.tokens_computed()},
                 {"kv_and_activation_bytes",
                  static_cast<int64_t>(memory.kv_bytes + memory.activation_bytes)}};
    for (const char* baseline : kBaselines) {
      for (const auto& [other, theirs] : modes) {
        if (other == baseline) line[gain_key(baseline)] = gain(best_of(theirs), best);
      }
    }
    report.push_back(std::move(line));
  }
  return report;
}

std::string comparison_table(const Json& comparison) {
  std::string text =
      fmt::format("{:<14} {:>9} {:>9} {:>10}", "batching", "seconds", "tokens", "KV+act MB");
  for (const char* baseline : kBaselines) {
    text += fmt::format("  {:>30}", fmt::format("gain over {} (bound)", baseline));
  }
  text += "\n";
  for (const Json& line : comparison) {
    text += fmt::format("{:<14} {:>9.3f} {:>9} {:>10.1f}", line.at("batching").get<std::string>(),
                        line.at("wall_s").get<double>(), line.at("tokens_computed").get<int64_t>(),
                        line.at("kv_and_activation_bytes").get<double>() / 1e6);
    for (const char* baseline : kBaselines) {
      const auto found = line.find(gain_key(baseline));
      std::string cell = "-";
      if (found != line.end()) {
        cell = fmt::format("{:.2f} ({:.2f}, {:.0f}% of it)", found->at("gain").get<double>(),
                           found->at("bound").get<double>(),
                           100 * found->at("share_of_bound").get<double>());
      }
      text += fmt::format("  {:>30}", cell);
    }
    text += "\n";
  }
  return text;
}

}  // namespace rollpack::rollout
