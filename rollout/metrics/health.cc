#include "rollout/metrics/health.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

double value_of(const Snapshot& snapshot, const char* name) {
  const auto found = snapshot.values.find(name);
  return found == snapshot.values.end() ? 0 : found->second;
}

}  // namespace

Health health_of(const Snapshot& snapshot, std::chrono::steady_clock::time_point now,
                 const HealthLimits& limits) {
  using Seconds = std::chrono::duration<double>;
  if (snapshot.phase == ServingPhase::kDraining) return {false, "draining", "told to end"};
  if (snapshot.broken) return {false, "broken", format_error(*snapshot.broken)};
  if (snapshot.phase == ServingPhase::kStarting) return {false, "starting", "ranks are loading"};
  if (const Seconds age = now - snapshot.time; age > limits.answer) {
    return {false, "unresponsive",
            fmt::format("the dispatcher has not answered for {:.1f} s", age.count())};
  }
  if (snapshot.bridge_asked) {
    const Seconds owed = now - *snapshot.bridge_asked;
    if (owed > limits.answer) {
      return {false, "unresponsive",
              fmt::format("the bridge has not answered for {:.1f} s", owed.count())};
    }
  }
  if (value_of(snapshot, "num_workers") == 0) {
    return {false, "no_workers", "no rank takes part at present"};
  }
  const double silence_s = value_of(snapshot, "longest_silence_s");
  if (silence_s > limits.lease.count()) {
    return {false, "stuck",
            fmt::format("a rank with work has shown no progress for {:.1f} s; cluster.lease_s = {}",
                        silence_s, limits.lease.count())};
  }
  if (value_of(snapshot, "is_asleep") > 0) return {true, "asleep", ""};
  if (value_of(snapshot, "needs_weights") > 0) {
    return {true, "without_weights", "sleep(level=2) has dropped them: send a whole update"};
  }
  return {true, value_of(snapshot, "is_paused") > 0 ? "paused" : "ok", ""};
}

std::string health_json(const Health& health, const Snapshot& snapshot) {
  nlohmann::ordered_json body = {{"status", health.status}};
  if (!health.message.empty()) body["message"] = health.message;
  for (const char* name : {"num_workers", "num_open_samples", "weight_version"}) {
    const auto found = snapshot.values.find(name);
    if (found != snapshot.values.end()) body[name] = static_cast<int64_t>(found->second);
  }
  return body.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace rollpack::rollout
