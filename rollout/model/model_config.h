// A model's architecture as config.json states it, checked: what is not implemented is an error
// naming key and value, never ignored.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace rollpack::rollout {

enum class RopeScaling : uint8_t { kNone, kLinear, kLlama3 };

struct RopeConfig {
  double theta = 10000.0;
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1.0;
  // llama3 only; see its formula in model/rope_table.cc.
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  int64_t original_max_position_embeddings = 8192;
};

struct ModelConfig {
  std::string architecture;  // "LlamaForCausalLM", "Qwen2ForCausalLM", ...
  int64_t hidden_size = 0;             // D
  int64_t num_attention_heads = 0;     // H
  int64_t num_key_value_heads = 0;     // G
  int64_t head_dim = 0;                // K
  int64_t intermediate_size = 0;       // F
  int64_t vocab_size = 0;              // V
  int64_t num_hidden_layers = 0;       // L
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  bool tie_word_embeddings = false;
  bool has_qkv_bias = false;
  bool has_o_bias = false;    // Llama's attention_bias puts one on o_proj too
  bool has_mlp_bias = false;
  bool has_qk_norm = false;   // Qwen3
  std::vector<int32_t> layer_windows;  // [L] sliding window of each layer, 0 for full attention
  RopeConfig rope;
  std::vector<int32_t> eos_token_ids;  // config.json's and generation_config.json's, sorted
  int32_t pad_token_id = -1;           // -1: none given

  // What pads are written as: pad_token_id, else the lowest EOS id.
  int32_t written_pad_id() const {
    if (pad_token_id >= 0) return pad_token_id;
    return eos_token_ids.empty() ? 0 : eos_token_ids.front();
  }

  // Sequence length whose attention costs as many FLOPs as its linear layers, the head included,
  // rounded down: 2 W t against 2 L H K t^2 for t tokens, W weights used for each token. Sliding
  // windows are not taken into account.
  int64_t attention_parity_tokens() const {
    const int64_t heads = num_attention_heads * head_dim;
    const int64_t projections = 2 * heads + 2 * num_key_value_heads * head_dim;
    const int64_t layer = hidden_size * (projections + 3 * intermediate_size);
    const int64_t weights = num_hidden_layers * layer + hidden_size * vocab_size;
    return weights / (num_hidden_layers * heads);
  }

  kernels::ModelShape shape(DType dtype) const {
    return {.D = hidden_size, .H = num_attention_heads, .G = num_key_value_heads, .K = head_dim,
            .F = intermediate_size, .V = vocab_size, .L = num_hidden_layers, .dtype = dtype};
  }
};

// Reads config.json and generation_config.json of a Hugging Face folder.
// Errors: not_found; invalid_argument or unsupported naming file, key, value and what is allowed.
ModelConfig read_model_config(const std::string& folder);

}  // namespace rollpack::rollout
