#include "rollout/sampling/request_sampling.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "kernels/base/error.h"
#include "rollout/sampling/temperature.h"

namespace rollpack::rollout {
namespace {

constexpr int32_t kMaxResponseLength = 1 << 24;
constexpr size_t kMaxStopTokenIds = 1024;

// Takes a key's override or its default and remembers which, so that errors name the right one.
class Chooser {
 public:
  explicit Chooser(std::string origin) : origin_(std::move(origin)) {}

  // The override where there is one; it must satisfy `is_allowed`.
  template <class T, class Default, class Check>
  T choose(const char* key, const std::optional<T>& override_value, const Default& default_value,
           std::string_view allowed, Check&& is_allowed) const {
    const T value = override_value ? *override_value : static_cast<T>(default_value);
    if (!is_allowed(value)) {
      fail(key, override_value.has_value(), fmt::format("{}", value), std::string(allowed));
    }
    return value;
  }

  [[noreturn]] void fail(const char* key, bool is_override, std::string value,
                         std::string allowed) const {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = fmt::format("{}.{}", is_override ? "sampling" : "rollout", key),
                 .value = std::move(value),
                 .origin = origin_,
                 .allowed = std::move(allowed)});
  }

 private:
  std::string origin_;
};

std::vector<int32_t> stop_set(const Chooser& chooser, const RolloutSection& defaults,
                              const bridge::SamplingOverrides& overrides,
                              std::span<const int32_t> eos_token_ids, int64_t vocab_size) {
  const bool is_override = overrides.stop_token_ids.has_value();
  std::vector<int32_t> ids = is_override ? *overrides.stop_token_ids : defaults.stop_token_ids;
  if (ids.size() > kMaxStopTokenIds) {
    chooser.fail("stop_token_ids", is_override, fmt::format("a list of {}", ids.size()),
                 fmt::format("at most {} ids", kMaxStopTokenIds));
  }
  for (const int32_t id : ids) {
    if (id >= 0 && id < vocab_size) continue;
    chooser.fail("stop_token_ids", is_override, fmt::format("[.., {}, ..]", id),
                 fmt::format("token ids from 0 to {}, the model's vocabulary", vocab_size - 1));
  }
  if (!overrides.ignore_eos.value_or(defaults.ignore_eos)) {
    ids.insert(ids.end(), eos_token_ids.begin(), eos_token_ids.end());
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

}  // namespace

RequestSampling resolve_sampling(const RolloutSection& defaults,
                                 const bridge::SamplingOverrides& overrides,
                                 std::span<const int32_t> eos_token_ids, int64_t vocab_size,
                                 const std::string& origin) {
  const Chooser chooser(origin);
  RequestSampling sampling;
  // Comparisons are written so that NaN fails them.
  sampling.params.temperature =
      chooser.choose("temperature", overrides.temperature, defaults.temperature,
                     kTemperatureAllowed, is_temperature);
  const int32_t top_k = chooser.choose("top_k", overrides.top_k, defaults.top_k,
                                       "a positive integer, or -1 or 0 for off",
                                       [](int32_t value) { return value >= -1; });
  sampling.params.top_k = std::max(top_k, 0);
  sampling.params.top_p =
      chooser.choose("top_p", overrides.top_p, defaults.top_p, "a number above 0, at most 1",
                     [](float value) { return value > 0 && value <= 1; });
  sampling.params.min_p =
      chooser.choose("min_p", overrides.min_p, defaults.min_p, "a number from 0 to 1",
                     [](float value) { return value >= 0 && value <= 1; });
  sampling.seed = overrides.seed.value_or(defaults.seed);
  sampling.response_length =
      chooser.choose("response_length", overrides.response_length, defaults.response_length,
                     fmt::format("an integer from 1 to {}", kMaxResponseLength),
                     [](int32_t value) { return value >= 1 && value <= kMaxResponseLength; });
  sampling.min_tokens = chooser.choose(
      "min_tokens", overrides.min_tokens, defaults.min_tokens,
      fmt::format("an integer from 0 to the response_length of {}", sampling.response_length),
      [&](int32_t value) { return value >= 0 && value <= sampling.response_length; });
  sampling.stop_token_ids = stop_set(chooser, defaults, overrides, eos_token_ids, vocab_size);
  return sampling;
}

}  // namespace rollpack::rollout
