// What the checkpoint of a model of a given shape would say, for models of made weights.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/backend.h"
#include "rollout/model/model_config.h"

namespace rollpack::bench {

// Llama's architecture with tied embeddings and no windows, for at most `num_positions` tokens.
inline rollout::ModelConfig config_of(const kernels::ModelShape& shape, int64_t num_positions) {
  rollout::ModelConfig config;
  config.architecture = "LlamaForCausalLM";
  config.hidden_size = shape.D;
  config.num_attention_heads = shape.H;
  config.num_key_value_heads = shape.G;
  config.head_dim = shape.K;
  config.intermediate_size = shape.F;
  config.vocab_size = shape.V;
  config.num_hidden_layers = shape.L;
  config.max_position_embeddings = num_positions;
  config.tie_word_embeddings = true;
  config.layer_windows.assign(static_cast<size_t>(shape.L), 0);
  return config;
}

}  // namespace rollpack::bench
