// A transformer of a few ten thousand weights over any backend: whole steps with everything a model
// may ask of the ops (biases, head norms, windows, a tied head), in sizes that fit no tile.
#pragma once

#include <string>
#include <vector>

#include "tests/kernels/rig.h"

namespace rollpack::kernels::testing {

inline const std::vector<DType> kModelDTypes = {DType::kF32, DType::kBF16};

class TinyModel {
 public:
  static constexpr int64_t kPositions = 512;

  TinyModel(const std::string& backend, DType dtype, RigOptions options = {});

  StepResult run(StepPlan plan) { return rig_.run(std::move(plan)); }
  // Sets all weights from `seed` without staging them; a new model has those of seed 0.
  void set_weights(uint64_t seed);
  // Fills what the forward pass writes with bits that are NaN. No step is under way.
  void poison();

  Rig& rig() { return rig_; }
  int64_t V() const { return rig_.shape().V; }

 private:
  Rig rig_;
  std::vector<WeightId> ids_;
  std::vector<Tensor> written_;  // by the forward pass
};

// Scores every row of the sequence added last: row i's successor is `successors[i]`.
void score_all(StepPlan& plan, const std::vector<int32_t>& successors);
// Pages that hold `tokens` tokens of 16 a page.
int32_t pages_for(int64_t tokens);
void expect_same_results(const std::vector<HeadResult>& got, const std::vector<HeadResult>& want,
                         const std::string& what);

}  // namespace rollpack::kernels::testing
