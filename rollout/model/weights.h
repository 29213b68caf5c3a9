// Which tensors of a Hugging Face model make up which weight of the backend, and the checks of a
// whole set of them: names, shapes, nothing missing, nothing extra, tied heads really tied. Files
// and weight updates go through the same door, so that equal tensors give equal bits. A rank of a
// replica of several holds some rows of each matrix (kernels/shards.h), and reads only those.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels/backend.h"
#include "rollout/model/checkpoint.h"
#include "rollout/model/model_config.h"

namespace rollpack::rollout {

// Backend weights of one transformer layer; kNoWeight where the model has none.
struct LayerWeights {
  kernels::WeightId attention_norm = kernels::kNoWeight;  // [D]
  kernels::WeightId qkv = kernels::kNoWeight;             // [(H + 2 G) K, D]
  kernels::WeightId qkv_bias = kernels::kNoWeight;        // [(H + 2 G) K]
  kernels::WeightId q_norm = kernels::kNoWeight;          // [K]
  kernels::WeightId k_norm = kernels::kNoWeight;          // [K]
  kernels::WeightId o = kernels::kNoWeight;               // [D, H K]
  kernels::WeightId o_bias = kernels::kNoWeight;          // [D]
  kernels::WeightId mlp_norm = kernels::kNoWeight;        // [D]
  kernels::WeightId gate_up = kernels::kNoWeight;         // [2 F, D]
  kernels::WeightId gate_up_bias = kernels::kNoWeight;    // [2 F]
  kernels::WeightId down = kernels::kNoWeight;            // [D, F]
  kernels::WeightId down_bias = kernels::kNoWeight;       // [D]
};

// Rows and columns of a tensor as backends take them: a vector is one row.
std::array<int64_t, 2> matrix_shape(std::span<const int64_t> shape);

class ModelWeights {
 public:
  // Declares every weight of `config` at the backend, or what rank `at` of a replica holds of it.
  ModelWeights(const ModelConfig& config, kernels::Backend& backend, kernels::ReplicaRank at = {});

  // One set of tensors at a time: begin, stage each, finish (nothing missing), then the backend's
  // commit or discard. Errors name the tensor, its shape and what is expected.
  void begin_staging();
  // What is not staged stays as it is committed.
  void begin_partial_staging();
  void stage(const std::string& name, DType dtype, std::span<const int64_t> shape,
             std::span<const std::byte> bytes);
  // Rows and columns of `source` are matrix_shape(shape).
  void stage(const std::string& name, std::span<const int64_t> shape,
             const kernels::WeightSource& source);
  void finish_staging() const;

  // Stages all tensors of a folder and checks that nothing is missing.
  void load(const Checkpoint& checkpoint);

  // Stages made tensors (dummy_weights.h) instead.
  void load_dummy();

  kernels::WeightId embedding = kernels::kNoWeight;   // [V, D]
  kernels::WeightId lm_head = kernels::kNoWeight;     // [V, D]; the embedding where tied
  kernels::WeightId final_norm = kernels::kNoWeight;  // [D]
  std::vector<LayerWeights> layers;                   // [L]

 private:
  // Where a tensor goes.
  struct Place {
    kernels::WeightId weight = kernels::kNoWeight;
    int32_t part = 0;
    std::vector<int64_t> shape;
    kernels::ShardRange held;  // rows
  };
  // One tensor of a weight.
  struct Part {
    std::string tensor;
    int64_t rows = 0;
    kernels::ShardRange held;
  };

  kernels::WeightId declare(const std::string& name, kernels::WeightKind kind, int64_t cols,
                            const std::vector<Part>& parts);
  // Errors: a name that the model does not have; another shape.
  void check_tensor(const std::string& name, std::span<const int64_t> shape) const;
  // Stages a checked tensor.
  void stage(const std::string& name, const kernels::WeightSource& source);

  kernels::Backend& backend_;
  bool is_tied_;
  bool is_partial_ = false;  // the set being staged began as a copy of the committed one
  std::unordered_map<std::string, Place> places_;
  std::unordered_map<std::string, bool> is_staged_;
  // Fingerprints of a tied model's two copies as staged; 0: not there.
  uint64_t embedding_hash_ = 0, tied_head_hash_ = 0;
  bool head_may_come_ = true;  // so that the embedding has to be fingerprinted
};

}  // namespace rollpack::rollout
