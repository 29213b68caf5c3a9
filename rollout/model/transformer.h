// The forward pass of a decoder-only transformer (Llama, Qwen2, Qwen3, Mistral), written once over
// the Backend's ops: pre-norm blocks with rotary attention and a gated MLP, f32 residual stream.
//
// On a replica of several ranks every one runs it, each writing the columns that its weights give;
// four gathers a layer complete what the next product sums over. No sum is ever split.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "rollout/model/model_config.h"
#include "rollout/model/weights.h"

namespace rollpack::rollout {

class Transformer : public kernels::StepProgram {
 public:
  // Allocates activations for max_rows token rows, and the rotation table of positions
  // [0, num_positions).
  Transformer(const ModelConfig& config, const ModelWeights& weights, kernels::Backend& backend,
              DType dtype, int64_t max_rows, int64_t num_positions, kernels::ReplicaRank at = {});
  ~Transformer() override;

  void run(kernels::Backend& backend, int64_t num_rows, int64_t num_head_rows) override;
  // Ranks that hold a model together meet in every step.
  bool is_replayable() const override { return at_.size == 1; }
  void on_replay() override;

  // Layers computed so far, by all steps. Any thread: it says that a long step is under way, and
  // orders nothing.
  int64_t num_layers_run() const { return num_layers_run_.load(std::memory_order_relaxed); }

 private:
  void run_layer(int64_t layer, int64_t num_rows);
  kernels::Tensor view(const kernels::Buffer& buffer, DType dtype, int64_t rows,
                       int64_t cols) const;
  int64_t begin_of(const std::vector<int64_t>& starts) const {
    return starts[static_cast<size_t>(at_.rank)];
  }
  // The tensor with the columns of all ranks, each of which has written its own.
  kernels::Tensor gathered(const kernels::Tensor& tensor, const std::vector<int64_t>& starts) const;

  const ModelConfig config_;
  const ModelWeights& weights_;
  kernels::Backend& backend_;
  const DType dtype_;  // compute dtype: what matrix products read
  int64_t num_positions_;
  const kernels::ReplicaRank at_;
  int64_t q_cols_, qkv_cols_;  // of this rank
  // Columns that each rank computes, [ranks + 1]: of attention, of the MLP's middle, of the
  // residual stream.
  std::vector<int64_t> attended_starts_, gated_starts_, residual_starts_;
  std::atomic<int64_t> num_layers_run_ = 0;

  kernels::Buffer residual_;    // [rows, D] f32
  kernels::Buffer normed_;      // [rows, D] compute dtype
  kernels::Buffer qkv_;         // [rows, (H + 2 G) K] f32, this rank's heads
  kernels::Buffer q_;           // [rows, H K] compute dtype, likewise
  kernels::Buffer attended_;    // [rows, H K] compute dtype
  kernels::Buffer gated_;       // [rows, F] compute dtype
  kernels::Buffer head_rows_;   // [rows, D] f32
  kernels::Buffer rope_table_;  // [positions, K] f32
};

}  // namespace rollpack::rollout
