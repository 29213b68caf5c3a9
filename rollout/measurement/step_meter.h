// Turns the steps of one engine into a Measurement.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "rollout/engine/step_work.h"
#include "rollout/measurement/measurement.h"
#include "rollout/measurement/roofline.h"

namespace rollpack::rollout {

class StepMeter : public StepObserver {
 public:
  StepMeter(const ModelConfig& model, DType dtype, const kernels::KvLayout& kv);

  void on_step(const StepWork& work) override;
  // What was measured since the last call; profile and stats are the caller's to fill in.
  Measurement take();

 private:
  double kv_bytes(const StepWork& work);
  int64_t num_distinct_pages(const StepWork& work, int32_t window);

  const ModelCost cost_;
  const kernels::KvLayout kv_;
  Measurement measured_;
  std::unordered_map<uint64_t, double> last_token_s_;  // of unfinished samples, by arrival
  std::vector<uint64_t> page_marks_;                   // [num_pages] last count that met the page
  uint64_t num_counts_ = 0;
};

}  // namespace rollpack::rollout
