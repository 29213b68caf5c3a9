// The distribution of one row: logprobs, entropy, truncation, and the draw (kernels/README.md).
#pragma once

#include <vector>

#include "kernels/backend.h"
#include "kernels/reference/step_state.h"

namespace rollpack::kernels::reference {

class TokenSampler {
 public:
  explicit TokenSampler(int64_t V);

  // [V] f64: the caller fills in the logits of a row before sample() and score().
  std::vector<double>& logits() { return logits_; }

  // Draws the slot's next token and advances the slot.
  HeadResult sample(Slot& slot, bool wants_entropy);
  // Scores `token` at `position`.
  HeadResult score(int32_t token, int32_t position, float temperature);

 private:
  // Fills scaled_; false where a number, scaled or not, is not a finite f32.
  bool scale(float temperature);
  void fill_support(const SlotInit& init, int32_t position);
  void truncate(const SamplingParams& sampling);
  void fill_logprobs(HeadResult& result) const;

  std::vector<double> logits_;
  std::vector<double> scaled_;   // logits / temperature
  std::vector<double> support_;  // scaled_, -inf where a token cannot be drawn
  std::vector<int32_t> order_;   // ids of the support, most probable first
};

}  // namespace rollpack::kernels::reference
