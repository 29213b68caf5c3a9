// A backend whose step is the head alone, with logits that the test chooses exactly: row r of the
// step is the unit vector e_r, so its logits are column r of the head's weight.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "tests/kernels/rig.h"

namespace rollpack::kernels::testing {

class HeadRig {
 public:
  // logits: [rows][V], as the compute dtype holds them.
  HeadRig(const std::string& backend, const std::vector<std::vector<float>>& logits,
          DType dtype = DType::kF32, RigOptions options = {})
      : width_(static_cast<int64_t>(logits.size())),
        rig_(backend, shape_of(logits, dtype), options) {
    const auto V = static_cast<int64_t>(logits[0].size());
    std::vector<float> weight(static_cast<size_t>(V * width_));
    for (int64_t v = 0; v < V; ++v) {
      for (int64_t r = 0; r < width_; ++r) {
        weight[static_cast<size_t>(v * width_ + r)] =
            logits[static_cast<size_t>(r)][static_cast<size_t>(v)];
      }
    }
    weight_ = rig_.weight(WeightKind::kLmHead, {weight}, width_);
  }

  // A plan of one row for each of the logit rows, without samples or scores.
  StepPlan plan() const { return plan_of_rows(width_); }

  StepResult run(const StepPlan& plan) {
    std::vector<int32_t> rows;
    for (const SampleRow& sample : plan.samples) rows.push_back(sample.row);
    for (const ScoreRow& score : plan.scores) rows.push_back(score.row);
    std::sort(rows.begin(), rows.end());
    rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
    std::vector<float> in(rows.size() * static_cast<size_t>(width_), 0.0f);
    for (size_t i = 0; i < rows.size(); ++i) {
      in[i * static_cast<size_t>(width_) + static_cast<size_t>(rows[i])] = 1.0f;
    }
    const Tensor tensor =
        rig_.tensor(rig_.shape().dtype, static_cast<int64_t>(rows.size()), width_, in);
    return rig_.run(plan,
                    [&](Backend& backend) { backend.lm_head({.weight = weight_, .in = tensor}); });
  }

  Rig& rig() { return rig_; }

 private:
  static ModelShape shape_of(const std::vector<std::vector<float>>& logits, DType dtype) {
    ModelShape shape = small_shape(dtype);
    shape.D = static_cast<int64_t>(logits.size());
    shape.V = static_cast<int64_t>(logits[0].size());
    return shape;
  }

  int64_t width_;
  Rig rig_;
  WeightId weight_ = kNoWeight;
};

}  // namespace rollpack::kernels::testing
