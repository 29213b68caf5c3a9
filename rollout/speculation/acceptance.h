// How many draft tokens have come true lately, and whether the next draft is worth its rows.
#pragma once

#include <cstdint>

namespace rollpack::rollout {

class Acceptance {
 public:
  // What one more row adds to the time of a step of one row, of which the weights' way from memory
  // is most. Whole steps of up to 24 rows, bf16, two cores with AVX512-BF16, 2026-11: 0.04 at 135M,
  // 0.003 to 0.013 at 0.5B; above the highest of them.
  static constexpr float kRowCost = 0.05f;
  // A draft in so many steps all the same: where none ever comes true, the 20 rows beside four
  // sequences cost 1.0 / 1.15 / 65 = 1.3 %, the 5 rows beside one 0.4 %.
  static constexpr int32_t kProbeInterval = 64;

  // In a step of `num_active` sequences an accepted token is worth 1 / num_active of the step, and
  // a draft token costs at most kRowCost of it.
  bool is_due(int32_t num_active) const {
    return share_ >= kRowCost * static_cast<float>(num_active) || num_skipped_ >= kProbeInterval;
  }
  // Steps without a draft, since the last one.
  int32_t num_skipped() const { return num_skipped_; }
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
