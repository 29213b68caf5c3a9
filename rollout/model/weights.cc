#include "rollout/model/weights.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

using kernels::WeightId;
using kernels::WeightKind;

constexpr const char* kEmbeddingName = "model.embed_tokens.weight";
constexpr const char* kHeadName = "lm_head.weight";

std::string shape_text(std::span<const int64_t> shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

// 64-bit fingerprint of a tensor's dtype and bytes, eight at a time; never 0.
// Source: the mixing step of splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
uint64_t fingerprint(DType dtype, std::span<const std::byte> bytes) {
  uint64_t hash = 0x9E3779B97F4A7C15ull + static_cast<uint64_t>(dtype);
  for (size_t i = 0; i < bytes.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, std::min<size_t>(8, bytes.size() - i));
    hash = (hash ^ word) * 0xBF58476D1CE4E5B9ull;
    hash ^= hash >> 29;
  }
  return hash | 1;
}

// Buffers that old checkpoints carry and that the forward pass derives itself.
bool is_derived(const std::string& name) {
  return name.ends_with(".rotary_emb.inv_freq");
}

}  // namespace

ModelWeights::ModelWeights(const ModelConfig& config, kernels::Backend& backend)
    : backend_(backend), is_tied_(config.tie_word_embeddings) {
  const int64_t D = config.hidden_size, F = config.intermediate_size, V = config.vocab_size;
  const int64_t K = config.head_dim;
  const int64_t q_rows = config.num_attention_heads * K, kv_rows = config.num_key_value_heads * K;
  embedding = declare("embed_tokens", WeightKind::kEmbedding, D, {{kEmbeddingName, V}});
  lm_head = is_tied_ ? embedding : declare("lm_head", WeightKind::kLmHead, D, {{kHeadName, V}});
  final_norm = declare("norm", WeightKind::kVector, 1, {{"model.norm.weight", D}});
  for (int64_t l = 0; l < config.num_hidden_layers; ++l) {
    const std::string at = fmt::format("model.layers.{}.", l);
    const std::string label = fmt::format("layers.{}.", l);
    const std::string attn = at + "self_attn.", mlp = at + "mlp.";
    LayerWeights& w = layers.emplace_back();
    w.attention_norm = declare(label + "input_layernorm", WeightKind::kVector, 1,
                               {{at + "input_layernorm.weight", D}});
    w.qkv = declare(label + "qkv", WeightKind::kLinear, D,
                    {{attn + "q_proj.weight", q_rows},
                     {attn + "k_proj.weight", kv_rows},
                     {attn + "v_proj.weight", kv_rows}});
    if (config.has_qkv_bias) {
      w.qkv_bias = declare(label + "qkv_bias", WeightKind::kVector, 1,
                           {{attn + "q_proj.bias", q_rows},
                            {attn + "k_proj.bias", kv_rows},
                            {attn + "v_proj.bias", kv_rows}});
    }
    if (config.has_qk_norm) {
      w.q_norm = declare(label + "q_norm", WeightKind::kVector, 1, {{attn + "q_norm.weight", K}});
      w.k_norm = declare(label + "k_norm", WeightKind::kVector, 1, {{attn + "k_norm.weight", K}});
    }
    w.o = declare(label + "o", WeightKind::kLinear, q_rows, {{attn + "o_proj.weight", D}});
    if (config.has_o_bias) {
      w.o_bias = declare(label + "o_bias", WeightKind::kVector, 1, {{attn + "o_proj.bias", D}});
    }
    w.mlp_norm = declare(label + "post_attention_layernorm", WeightKind::kVector, 1,
                         {{at + "post_attention_layernorm.weight", D}});
    w.gate_up = declare(label + "gate_up", WeightKind::kGated, D,
                        {{mlp + "gate_proj.weight", F}, {mlp + "up_proj.weight", F}});
    w.down = declare(label + "down", WeightKind::kLinear, F, {{mlp + "down_proj.weight", D}});
    if (config.has_mlp_bias) {
      w.gate_up_bias = declare(label + "gate_up_bias", WeightKind::kVector, 1,
                               {{mlp + "gate_proj.bias", F}, {mlp + "up_proj.bias", F}});
      w.down_bias =
          declare(label + "down_bias", WeightKind::kVector, 1, {{mlp + "down_proj.bias", D}});
    }
  }
}

WeightId ModelWeights::declare(const std::string& name, WeightKind kind, int64_t cols,
                               const std::vector<std::pair<std::string, int64_t>>& parts) {
  kernels::WeightSpec spec{.name = name, .kind = kind, .cols = cols};
  for (const auto& [tensor, rows] : parts) spec.part_rows.push_back(rows);
  const WeightId id = backend_.declare_weight(spec);
  for (int32_t part = 0; part < static_cast<int32_t>(parts.size()); ++part) {
    const auto& [tensor, rows] = parts[part];
    places_[tensor] = {.weight = id,
                       .part = part,
                       .shape = kind == WeightKind::kVector ? std::vector<int64_t>{rows}
                                                            : std::vector<int64_t>{rows, cols}};
  }
  return id;
}

void ModelWeights::begin_staging() {
  is_staged_.clear();
  embedding_hash_ = tied_head_hash_ = 0;
  is_partial_ = false;
  backend_.begin_staging();
}

void ModelWeights::begin_partial_staging() {
  begin_staging();
  backend_.copy_committed_to_staged();
  is_partial_ = true;
}

void ModelWeights::stage(const std::string& name, DType dtype, std::span<const int64_t> shape,
                         std::span<const std::byte> bytes) {
  if (is_derived(name)) return;
  if (is_tied_ && name == kHeadName) return stage_tied_head(dtype, shape, bytes);
  const auto found = places_.find(name);
  if (found == places_.end()) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = name,
                 .value = shape_text(shape),
                 .allowed = fmt::format("one of this model's {} tensors", places_.size()),
                 .message = "the model has no such tensor"});
  }
  const Place& place = found->second;
  if (!std::ranges::equal(shape, place.shape)) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = name,
                 .value = shape_text(shape),
                 .allowed = shape_text(place.shape),
                 .message = "the tensor's shape does not fit config.json"});
  }
  if (is_staged_[name]) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = name,
                 .value = "given twice",
                 .allowed = "each tensor once"});
  }
  const int64_t rows = place.shape[0];
  const int64_t cols = place.shape.size() == 1 ? 1 : place.shape[1];
  const bool is_vector = place.shape.size() == 1;
  backend_.load_weight(place.weight, place.part,
                       {.data = bytes.data(),
                        .dtype = dtype,
                        .shape = {is_vector ? 1 : rows, is_vector ? rows : cols}},
                       {.begin = 0, .end = rows});
  if (is_tied_ && name == kEmbeddingName) embedding_hash_ = fingerprint(dtype, bytes);
  is_staged_[name] = true;
}

void ModelWeights::stage_tied_head(DType dtype, std::span<const int64_t> shape,
                                   std::span<const std::byte> bytes) {
  const std::vector<int64_t>& expected = places_.at(kEmbeddingName).shape;
  if (!std::ranges::equal(shape, expected)) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = kHeadName,
                 .value = shape_text(shape),
                 .allowed = shape_text(expected)});
  }
  tied_head_hash_ = fingerprint(dtype, bytes);
}

void ModelWeights::finish_staging() const {
  std::vector<std::string> missing;
  for (const auto& [name, place] : places_) {
    const auto staged = is_staged_.find(name);
    if (staged == is_staged_.end() || !staged->second) missing.push_back(name);
  }
  if (!missing.empty() && !is_partial_) {
    std::sort(missing.begin(), missing.end());
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = missing.front(),
                 .value = "missing",
                 .allowed = fmt::format("all {} tensors of the model", places_.size()),
                 .message = fmt::format("{} of them are missing", missing.size())});
  }
  if (tied_head_hash_ != 0 && embedding_hash_ == 0) {  // in a partial set
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = kHeadName,
                 .value = "without model.embed_tokens.weight",
                 .allowed = "both or neither: tie_word_embeddings is true",
                 .message = "send the embedding; the head is the same tensor"});
  }
  if (tied_head_hash_ != 0 && tied_head_hash_ != embedding_hash_) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = kHeadName,
                 .value = "other bytes than model.embed_tokens.weight",
                 .allowed = "the same bytes: tie_word_embeddings is true",
                 .message = "leave the head out, or untie the model in config.json"});
  }
}

void ModelWeights::load(const Checkpoint& checkpoint) {
  begin_staging();
  std::vector<std::byte> buffer;
  const std::vector<TensorInfo>& tensors = checkpoint.tensors();
  // First, so that a quantized checkpoint is told from one whose names do not fit.
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i].is_readable && !is_derived(tensors[i].name)) checkpoint.read(i, buffer);
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (is_derived(tensors[i].name)) continue;
    checkpoint.read(i, buffer);
    stage(tensors[i].name, tensors[i].dtype, tensors[i].shape, buffer);
  }
  finish_staging();
}

}  // namespace rollpack::rollout
