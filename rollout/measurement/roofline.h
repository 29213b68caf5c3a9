// What a model's work costs at least, in operations and bytes: the roof that speed is held against.
#pragma once

#include <cstdint>
#include <vector>

#include "rollout/model/model_config.h"

namespace rollpack::rollout {

// FLOP count multiply-adds twice. Pads, recomputation and rejected drafts are nobody's need and are
// not in any of these numbers; norms, rotations and biases are left out.
class ModelCost {
 public:
  ModelCost(const ModelConfig& model, DType dtype);

  // All linear layers, one token.
  double linear_flops() const { return 2 * layer_parameters_ * num_layers_; }
  // The head, one sampled or scored token.
  double head_flops() const { return 2 * head_parameters_; }
  // Attention of the rows at positions [begin, end), all layers: 4 H K a visible (token, key) pair.
  double attention_flops(int64_t begin, int64_t end) const;

  // Weights that every step reads, and those that a step with sampled or scored rows reads besides.
  double layer_bytes() const { return layer_parameters_ * num_layers_ * element_bytes_; }
  double head_bytes() const { return head_parameters_ * element_bytes_; }

  struct WindowLayers {
    int32_t window = 0;  // 0: all keys
    int32_t num_layers = 0;
  };
  const std::vector<WindowLayers>& windows() const { return windows_; }
  int64_t num_layers() const { return num_layers_; }

 private:
  int64_t num_layers_ = 0;
  double layer_parameters_ = 0;
  double head_parameters_ = 0;
  double pair_flops_ = 0;  // one layer
  double element_bytes_ = 0;
  std::vector<WindowLayers> windows_;
};

// Visible (token, key) pairs of the rows at positions [begin, end) of one sequence, one layer.
double visible_pairs(int64_t begin, int64_t end, int32_t window);

}  // namespace rollpack::rollout
