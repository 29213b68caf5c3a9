// How many draft tokens have come true lately, and whether the next draft is worth its rows.
#pragma once

#include <cstdint>

namespace rollpack::rollout {

class Acceptance {
 public:
  // What one more row adds to the time of a step of few rows, of which the weights' way from memory
  // is most. Measured at 0.5B, bf16, two cores: 0.014 on a Zen 4 (matrix products alone, up to 6
  // rows), 0.11 on a Zen 5 (whole steps, 1 to 6 rows); the higher of the two.
  static constexpr float kRowCost = 0.11f;
  // A draft in so many steps all the same: five rows of it cost 0.55 / 64 = 0.9 % where none ever
  // comes true.
  static constexpr int32_t kProbeInterval = 64;

  // In a step of `num_active` sequences an accepted token is worth 1 / num_active of the step, and
  // a draft token costs kRowCost of it.
  bool is_due(int32_t num_active) const {
    return share_ >= kRowCost * static_cast<float>(num_active) || num_skipped_ >= kProbeInterval;
  }
  // A step went by without a draft.
  void skip() { ++num_skipped_; }
  // A draft was verified.
  void learn(int32_t num_accepted, int32_t num_draft_tokens) {
    const float share = static_cast<float>(num_accepted) / static_cast<float>(num_draft_tokens);
    share_ += (share - share_) / 8;
    num_skipped_ = 0;
  }

 private:
  float share_ = 0.6f;  // accepted of drafted, of about the last eight; at first they get a chance
  int32_t num_skipped_ = 0;
};

}  // namespace rollpack::rollout
