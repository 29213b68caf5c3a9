// A two-layer Llama of a few thousand random weights, made in memory: for tests of what happens
// around a model rather than in it.
#pragma once

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "rollout/engine/replica.h"

namespace rollpack::rollout {

inline ModelConfig tiny_model_config() {
  ModelConfig model;
  model.architecture = "LlamaForCausalLM";
  model.hidden_size = 24;
  model.num_attention_heads = 4;
  model.num_key_value_heads = 2;
  model.head_dim = 6;
  model.intermediate_size = 40;
  model.vocab_size = 71;
  model.num_hidden_layers = 2;
  model.max_position_embeddings = 128;
  model.tie_word_embeddings = true;
  model.layer_windows = {0, 0};
  model.eos_token_ids = {2};
  return model;
}

inline Config tiny_config() {
  Config config;
  config.engine.backend = "reference";
  config.engine.kv_cache_memory = 1 << 20;
  config.engine.max_num_seqs = 8;
  config.engine.max_num_batched_tokens = 64;
  config.rollout.n = 3;
  config.rollout.prompt_length = 32;
  config.rollout.response_length = 12;
  return config;
}

struct NamedTensor {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<float> values;

  std::span<const std::byte> bytes() const { return std::as_bytes(std::span(values)); }
};

// All tensors of a model; the same seed gives the same weights.
inline std::vector<NamedTensor> tiny_tensors(uint32_t seed,
                                             const ModelConfig& m = tiny_model_config()) {
  std::mt19937 random(seed);
  std::vector<NamedTensor> tensors;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    NamedTensor tensor{.name = name, .shape = shape};
    const bool is_norm = shape.size() == 1;
    const int64_t count = is_norm ? shape[0] : shape[0] * shape[1];
    for (int64_t i = 0; i < count; ++i) {
      const float unit = static_cast<float>(random() % 2001) / 1000.0f - 1.0f;
      tensor.values.push_back(is_norm ? 1.0f + 0.1f * unit : 0.5f * unit);
    }
    tensors.push_back(std::move(tensor));
  };
  const int64_t D = m.hidden_size, F = m.intermediate_size;
  const int64_t q = m.num_attention_heads * m.head_dim, kv = m.num_key_value_heads * m.head_dim;
  add("model.embed_tokens.weight", {m.vocab_size, D});
  add("model.norm.weight", {D});
  if (!m.tie_word_embeddings) add("lm_head.weight", {m.vocab_size, D});
  for (int64_t l = 0; l < m.num_hidden_layers; ++l) {
    const std::string at = "model.layers." + std::to_string(l) + ".";
    add(at + "input_layernorm.weight", {D});
    add(at + "self_attn.q_proj.weight", {q, D});
    add(at + "self_attn.k_proj.weight", {kv, D});
    add(at + "self_attn.v_proj.weight", {kv, D});
    if (m.has_qkv_bias) {
      add(at + "self_attn.q_proj.bias", {q});
      add(at + "self_attn.k_proj.bias", {kv});
      add(at + "self_attn.v_proj.bias", {kv});
    }
    if (m.has_qk_norm) {
      add(at + "self_attn.q_norm.weight", {m.head_dim});
      add(at + "self_attn.k_norm.weight", {m.head_dim});
    }
    add(at + "self_attn.o_proj.weight", {D, q});
    add(at + "post_attention_layernorm.weight", {D});
    add(at + "mlp.gate_proj.weight", {F, D});
    add(at + "mlp.up_proj.weight", {F, D});
    add(at + "mlp.down_proj.weight", {D, F});
  }
  return tensors;
}

inline void load_tensors(Replica& replica, const std::vector<NamedTensor>& tensors) {
  replica.weights().begin_staging();
  for (const NamedTensor& tensor : tensors) {
    replica.weights().stage(tensor.name, DType::kF32, tensor.shape, tensor.bytes());
  }
  replica.weights().finish_staging();
  replica.backend().commit_weights();
}

inline std::unique_ptr<Replica> tiny_replica(const Config& config, uint32_t seed = 1) {
  auto replica = std::make_unique<Replica>(config, tiny_model_config(), ReplicaOptions{});
  load_tensors(*replica, tiny_tensors(seed));
  return replica;
}

}  // namespace rollpack::rollout
