// The configuration: one struct a YAML section, each field listed once in its fields() function.
// Parsing, checking, printing and help are visitors over that list.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace rollpack::rollout {

struct ModelSection {
  std::string path;
  std::string dtype = "bfloat16";
};

struct RolloutSection {
  int32_t n = 8;
  double temperature = 1.0;
  int32_t top_k = -1;
  double top_p = 1.0;
  double min_p = 0.0;
  uint64_t seed = 0;
  int32_t prompt_length = 512;
  int32_t response_length = 256;
  int32_t min_tokens = 0;
  bool ignore_eos = false;
  std::vector<int32_t> stop_token_ids;
  std::string prompt_overflow = "error";
  std::string logprobs_mode = "processed_logprobs";
};

struct EngineSection {
  std::string backend = "auto";
  std::string batching = "continuous";
  int32_t max_num_seqs = 256;
  int32_t max_num_batched_tokens = 2048;
  bool enable_chunked_prefill = true;
  bool enable_prefix_caching = true;
  int64_t kv_cache_memory = int64_t{2} << 30;
  int32_t num_threads = 0;
  std::string share_weights = "auto";
  int32_t tensor_model_parallel_size = 1;
};

struct BridgeSection {
  std::string socket = "run/rollpack.sock";
  int32_t slots = 4;
  int64_t slot_bytes = int64_t{64} << 20;
  std::string layout = "packed";
  int32_t max_tokens_per_row = 16384;
  std::vector<std::string> columns;
};

struct ClusterSection {};

struct Config {
  ModelSection model;
  RolloutSection rollout;
  EngineSection engine;
  BridgeSection bridge;
  ClusterSection cluster;
};

}  // namespace rollpack::rollout
