// What a temperature may be; the one rule that config, prompts and sequences share.
#pragma once

#include <string_view>

namespace rollpack::rollout {

// 0 is greedy. Below 1e-5 a scaled logit could overflow f32; above 1e5 every token is as likely.
inline constexpr std::string_view kTemperatureAllowed = "0 (greedy) or a number from 1e-5 to 1e5";

// Compared in f32, as the kernels hold it: 1e-5 written in decimal is allowed. NaN is not.
constexpr bool is_temperature(float value) {
  return value == 0.0f || (value >= 1e-5f && value <= 1e5f);
}

}  // namespace rollpack::rollout
