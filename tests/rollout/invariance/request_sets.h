// The models and the fixed requests of the invariance test.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/rollout/tiny_model.h"
#include "trainer_bridge/contract/rollout_service.h"

namespace rollpack::rollout {

struct TestModel {
  std::string name;
  ModelConfig config;
  DType dtype = DType::kBF16;
};

// Small in every direction, odd where it can be; both compute dtypes, tied and untied heads,
// biases, QK norm, a sliding window, and a vocabulary of two blocks.
inline std::vector<TestModel> test_models() {
  ModelConfig llama = tiny_model_config();
  llama.max_position_embeddings = 512;

  ModelConfig qwen3 = llama;
  qwen3.hidden_size = 18;
  qwen3.num_attention_heads = 3;
  qwen3.num_key_value_heads = 1;
  qwen3.intermediate_size = 35;
  qwen3.vocab_size = 130;
  qwen3.tie_word_embeddings = false;
  qwen3.has_qk_norm = true;
  qwen3.layer_windows = {0, 50};

  ModelConfig qwen2 = qwen3;
  qwen2.head_dim = 20;
  qwen2.num_attention_heads = 2;
  qwen2.vocab_size = 1100;
  qwen2.num_hidden_layers = 1;
  qwen2.has_qk_norm = false;
  qwen2.has_qkv_bias = true;
  qwen2.layer_windows = {0};
  return {{"llama bf16", llama, DType::kBF16},
          {"qwen3 f32", qwen3, DType::kF32},
          {"qwen2 bf16", qwen2, DType::kBF16}};
}

struct RequestSet {
  std::string name;
  std::vector<bridge::PromptRequest> prompts;
  int32_t num_samples = 0;
  int32_t longest = 0;  // tokens of its longest sequence

  void add(std::mt19937& random, int64_t vocab_size, int32_t num_tokens, int32_t n,
           int32_t response_length, bridge::SamplingOverrides sampling = {}) {
    bridge::PromptRequest prompt;
    prompt.prompt_id = bridge::PromptId{.text = name + std::to_string(prompts.size())};
    for (int32_t i = 0; i < num_tokens; ++i) {
      prompt.input_ids.push_back(static_cast<int32_t>(random() % vocab_size));
    }
    prompt.n = n;
    sampling.response_length = response_length;
    prompt.sampling = std::move(sampling);
    prompt.origin = name;
    prompts.push_back(std::move(prompt));
    num_samples += n;
    longest = std::max(longest, num_tokens + response_length);
  }
};

// A prompt of 300 tokens, to be cut anywhere, first; prompts of every way to sample beside it.
inline RequestSet long_requests(int64_t vocab_size) {
  std::mt19937 random(1);
  RequestSet set{.name = "long"};
  set.add(random, vocab_size, 300, 2, 10);
  set.add(random, vocab_size, 17, 2, 12, {.temperature = 0.7f, .top_k = 5, .top_p = 0.9f});
  set.add(random, vocab_size, 1, 1, 9, {.temperature = 0.0f});
  set.add(random, vocab_size, 40, 2, 20, {.min_p = 0.05f, .min_tokens = 3});
  // Greedy samples of a small model repeat themselves and each other: drafts come true.
  set.add(random, vocab_size, 21, 2, 24, {.temperature = 0.0f});
  return set;
}

// Enough samples for steps of up to 70 decoding rows.
inline RequestSet crowd_of_requests(int64_t vocab_size) {
  std::mt19937 random(2);
  RequestSet set{.name = "crowd"};
  while (set.num_samples < 72) {
    const auto draw = [&](uint32_t end) { return static_cast<int32_t>(random() % end); };
    set.add(random, vocab_size, 1 + draw(24), 1 + draw(6), 2 + draw(5));
  }
  return set;
}

// Enough for 513 rows that decode at once.
inline RequestSet wide_requests(int64_t vocab_size) {
  std::mt19937 random(3);
  RequestSet set{.name = "wide"};
  set.add(random, vocab_size, 3, 300, 2, {.ignore_eos = true});
  set.add(random, vocab_size, 1, 220, 3, {.ignore_eos = true});
  return set;
}

}  // namespace rollpack::rollout
