// Whole steps of a model with random weights through rollout's forward pass, with the time of each
// op apart: what a kernel's share of a step is, and how a step grows.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/profile/profiled_backend.h"
#include "rollout/model/transformer.h"
#include "rollout/model/weights.h"
#include "tests/bench/op_rig.h"

namespace rollpack::bench {

// One step.
struct StepTime {
  kernels::StepProfile profile;  // seconds of its ops
  double wall_s = 0;             // submit to result
};

class ModelRig {
 public:
  // A model without biases and with a tied head, of options.shape.
  explicit ModelRig(const RigOptions& options, int64_t num_positions);

  const RigOptions& options() const { return options_; }
  kernels::Backend& backend() { return *backend_; }
  StepTime run(kernels::StepPlan plan);

 private:
  class DeclaredWeights;

  RigOptions options_;
  std::vector<kernels::WeightSpec> specs_;
  std::unique_ptr<kernels::ProfiledBackend> backend_;
  std::unique_ptr<rollout::ModelWeights> weights_;
  std::shared_ptr<rollout::Transformer> transformer_;
};

// A step that decodes groups of siblings: the pages of a group's prompt are shared, each sample has
// `own_tokens` of its own besides. Every row is sampled at `temperature` where that is >= 0.
struct DecodeShape {
  int32_t num_groups = 16;
  int32_t group_size = 8;
  int32_t prompt_tokens = 768;
  int32_t own_tokens = 232;
  float temperature = -1.0f;

  int32_t num_rows() const { return num_groups * group_size; }
  int32_t num_pages() const;  // of all of them
};
kernels::StepPlan decode_plan(const DecodeShape& shape);

// Runs steps that write random keys and values of every token of `shape` in all layers, without the
// rest of a forward pass. Leaves a program of its own set.
void fill_cache(kernels::Backend& backend, const RigOptions& options, const DecodeShape& shape);

// FLOPs of a decode step: linear layers, attention and head.
struct StepFlops {
  double linear = 0, attention = 0, head = 0;
  double total() const { return linear + attention + head; }
};
StepFlops decode_flops(const kernels::ModelShape& model, const DecodeShape& shape);

}  // namespace rollpack::bench
