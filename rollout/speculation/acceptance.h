// How well drafts have done lately, and whether the next one is worth its rows.
#pragma once

#include <cstdint>

namespace rollpack::rollout {

class Acceptance {
 public:
  // Accepted tokens a draft must bring on average. Five more rows in a step of one cost 7 % where
  // weights stream from memory (Zen 4, two cores); three times that, because a small gain is not
  // worth its variance.
  static constexpr float kWorthwhile = 0.2f;
  // A draft in so many steps all the same: 7 % of 1 / 32 is what finding out costs at most.
  static constexpr int32_t kProbeInterval = 32;

  bool is_due() const { return mean_accepted_ >= kWorthwhile || num_skipped_ >= kProbeInterval; }
  // A step went by without a draft.
  void skip() { ++num_skipped_; }
  // A draft was verified.
  void learn(int32_t num_accepted) {
    mean_accepted_ += (static_cast<float>(num_accepted) - mean_accepted_) / 8;
    num_skipped_ = 0;
  }

 private:
  float mean_accepted_ = 1;  // of about the last eight; at the start drafts get their chance
  int32_t num_skipped_ = 0;
};

}  // namespace rollpack::rollout
