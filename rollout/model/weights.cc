#include "rollout/model/weights.h"

#include <algorithm>
#include <array>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"
#include "rollout/model/dummy_weights.h"
#include "rollout/model/finite_source.h"

namespace rollpack::rollout {
namespace {

using kernels::WeightId;
using kernels::WeightKind;

constexpr const char* kEmbeddingName = "model.embed_tokens.weight";
constexpr const char* kHeadName = "lm_head.weight";

std::string shape_text(std::span<const int64_t> shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

// 64-bit fingerprint of a tensor's dtype and bytes; never 0.
uint64_t fingerprint(const kernels::WeightSource& source) {
  uint64_t hash = static_cast<uint64_t>(source.dtype);
  std::vector<std::byte> scratch;
  // About a MB at a time, where it comes from a file.
  const int64_t step = std::max<int64_t>(1, (int64_t{1} << 20) / source.row_bytes());
  for (int64_t row = 0; row < source.rows; row += step) {
    const int64_t end = std::min(row + step, source.rows);
    const auto bytes = static_cast<size_t>((end - row) * source.row_bytes());
    hash = hash64({source.read_rows(row, end, scratch), bytes}, hash);
  }
  return hash | 1;
}

// A tensor of a file, read while it is packed.
class FileSource final : public kernels::WeightSource {
 public:
  FileSource(const Checkpoint& checkpoint, size_t index, int64_t rows, int64_t cols)
      : WeightSource(checkpoint.tensors()[index].dtype, rows, cols),
        checkpoint_(checkpoint),
        index_(index) {}

  const std::byte* read_rows(int64_t begin, int64_t end,
                             std::vector<std::byte>& scratch) const override {
    const auto bytes = static_cast<size_t>((end - begin) * row_bytes());
    if (scratch.size() < bytes) scratch.resize(bytes);
    checkpoint_.read(index_, begin * row_bytes(), std::span(scratch).first(bytes));
    return scratch.data();
  }

 private:
  const Checkpoint& checkpoint_;
  const size_t index_;
};

// Buffers that old checkpoints carry and that the forward pass derives itself.
bool is_derived(const std::string& name) {
  return name.ends_with(".rotary_emb.inv_freq");
}

}  // namespace

std::array<int64_t, 2> matrix_shape(std::span<const int64_t> shape) {
  if (shape.size() < 2) return {1, shape.empty() ? 1 : shape[0]};
  return {shape[0], shape[1]};
}

ModelWeights::ModelWeights(const ModelConfig& config, kernels::Backend& backend,
                           kernels::ReplicaRank at)
    : backend_(backend), is_tied_(config.tie_word_embeddings) {
  const int64_t D = config.hidden_size, F = config.intermediate_size, V = config.vocab_size;
  const int64_t K = config.head_dim;
  const int64_t q_rows = config.num_attention_heads * K, kv_rows = config.num_key_value_heads * K;
  const kernels::HeadShard heads =
      kernels::head_shard(config.num_attention_heads, config.num_key_value_heads, at);
  const kernels::ShardRange q{heads.query.begin * K, heads.query.end * K};
  const kernels::ShardRange kv{heads.kv.begin * K, heads.kv.end * K};
  const kernels::ShardRange d = kernels::column_shard(D, at), f = kernels::column_shard(F, at);
  const kernels::ShardRange v = kernels::vocabulary_shard(V, at);
  const auto whole = [](const std::string& tensor, int64_t rows) {
    return std::vector<Part>{{tensor, rows, {0, rows}}};
  };
  embedding = declare("embed_tokens", WeightKind::kEmbedding, D, {{kEmbeddingName, V, v}});
  lm_head = is_tied_ ? embedding : declare("lm_head", WeightKind::kLmHead, D, {{kHeadName, V, v}});
  final_norm = declare("norm", WeightKind::kVector, 1, whole("model.norm.weight", D));
  for (int64_t l = 0; l < config.num_hidden_layers; ++l) {
    const std::string at_layer = fmt::format("model.layers.{}.", l);
    const std::string label = fmt::format("layers.{}.", l);
    const std::string attn = at_layer + "self_attn.", mlp = at_layer + "mlp.";
    LayerWeights& w = layers.emplace_back();
    w.attention_norm = declare(label + "input_layernorm", WeightKind::kVector, 1,
                               whole(at_layer + "input_layernorm.weight", D));
    w.qkv = declare(label + "qkv", WeightKind::kLinear, D,
                    {{attn + "q_proj.weight", q_rows, q},
                     {attn + "k_proj.weight", kv_rows, kv},
                     {attn + "v_proj.weight", kv_rows, kv}});
    if (config.has_qkv_bias) {
      w.qkv_bias = declare(label + "qkv_bias", WeightKind::kVector, 1,
                           {{attn + "q_proj.bias", q_rows, q},
                            {attn + "k_proj.bias", kv_rows, kv},
                            {attn + "v_proj.bias", kv_rows, kv}});
    }
    if (config.has_qk_norm) {
      w.q_norm =
          declare(label + "q_norm", WeightKind::kVector, 1, whole(attn + "q_norm.weight", K));
      w.k_norm =
          declare(label + "k_norm", WeightKind::kVector, 1, whole(attn + "k_norm.weight", K));
    }
    w.o = declare(label + "o", WeightKind::kLinear, q_rows, {{attn + "o_proj.weight", D, d}});
    if (config.has_o_bias) {
      w.o_bias = declare(label + "o_bias", WeightKind::kVector, 1, {{attn + "o_proj.bias", D, d}});
    }
    w.mlp_norm = declare(label + "post_attention_layernorm", WeightKind::kVector, 1,
                         whole(at_layer + "post_attention_layernorm.weight", D));
    w.gate_up = declare(label + "gate_up", WeightKind::kGated, D,
                        {{mlp + "gate_proj.weight", F, f}, {mlp + "up_proj.weight", F, f}});
    w.down = declare(label + "down", WeightKind::kLinear, F, {{mlp + "down_proj.weight", D, d}});
    if (config.has_mlp_bias) {
      w.gate_up_bias = declare(label + "gate_up_bias", WeightKind::kVector, 1,
                               {{mlp + "gate_proj.bias", F, f}, {mlp + "up_proj.bias", F, f}});
      w.down_bias =
          declare(label + "down_bias", WeightKind::kVector, 1, {{mlp + "down_proj.bias", D, d}});
    }
  }
}

WeightId ModelWeights::declare(const std::string& name, WeightKind kind, int64_t cols,
                               const std::vector<Part>& parts) {
  kernels::WeightSpec spec{.name = name, .kind = kind, .cols = cols};
  bool is_sharded = false;
  for (const Part& part : parts) {
    spec.part_rows.push_back(part.rows);
    spec.shards.push_back(part.held);
    is_sharded = is_sharded || part.held.size() != part.rows;
  }
  if (!is_sharded) spec.shards.clear();
  const WeightId id = backend_.declare_weight(spec);
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    places_[part.tensor] = {.weight = id,
                            .part = static_cast<int32_t>(i),
                            .shape = kind == WeightKind::kVector
                                         ? std::vector<int64_t>{part.rows}
                                         : std::vector<int64_t>{part.rows, cols},
                            .held = part.held};
  }
  return id;
}

void ModelWeights::begin_staging() {
  is_staged_.clear();
  embedding_hash_ = tied_head_hash_ = 0;
  is_partial_ = false;
  head_may_come_ = true;
  backend_.begin_staging();
}

void ModelWeights::begin_partial_staging() {
  begin_staging();
  backend_.copy_committed_to_staged();
  is_partial_ = true;
}

void ModelWeights::check_tensor(const std::string& name, std::span<const int64_t> shape) const {
  // A tied model's head is a second copy of the embedding.
  const auto found = places_.find(is_tied_ && name == kHeadName ? kEmbeddingName : name);
  if (found == places_.end()) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = name,
                 .value = shape_text(shape),
                 .allowed = fmt::format("one of this model's {} tensors", places_.size()),
                 .message = "the model has no such tensor"});
  }
  if (!std::ranges::equal(shape, found->second.shape)) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = name,
                 .value = shape_text(shape),
                 .allowed = shape_text(found->second.shape),
                 .message = "the tensor's shape does not fit config.json"});
  }
}

void ModelWeights::stage(const std::string& name, DType dtype, std::span<const int64_t> shape,
                         std::span<const std::byte> bytes) {
  stage(name, shape, kernels::TensorSource({bytes.data(), dtype, matrix_shape(shape)}));
}

void ModelWeights::stage(const std::string& name, std::span<const int64_t> shape,
                         const kernels::WeightSource& source) {
  if (is_derived(name)) return;
  check_tensor(name, shape);
  stage(name, source);
}

void ModelWeights::stage(const std::string& name, const kernels::WeightSource& source) {
  if (is_staged_[name]) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = name,
                 .value = "given twice",
                 .allowed = "each tensor once"});
  }
  if (is_tied_ && name == kHeadName) {
    tied_head_hash_ = fingerprint(source);
  } else {
    const Place& place = places_.at(name);
    backend_.load_weight(place.weight, place.part, FiniteSource(name, source), place.held);
    if (is_tied_ && name == kEmbeddingName && head_may_come_) {
      embedding_hash_ = fingerprint(source);
    }
  }
  is_staged_[name] = true;
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
  const std::vector<TensorInfo>& tensors = checkpoint.tensors();
  // First, so that a quantized checkpoint is told from one whose names do not fit.
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!is_derived(tensors[i].name)) checkpoint.require_readable(i);
  }
  head_may_come_ = std::ranges::any_of(
      tensors, [](const TensorInfo& tensor) { return tensor.name == kHeadName; });
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorInfo& tensor = tensors[i];
    if (is_derived(tensor.name)) continue;
    check_tensor(tensor.name, tensor.shape);
    const auto [rows, cols] = matrix_shape(tensor.shape);
    stage(tensor.name, FileSource(checkpoint, i, rows, cols));
  }
  finish_staging();
}

void ModelWeights::load_dummy() {
  begin_staging();
  head_may_come_ = false;
  for (const auto& [name, place] : places_) {
    const auto [rows, cols] = matrix_shape(place.shape);
    stage(name, DummySource(name, rows, cols));
  }
  finish_staging();
}

}  // namespace rollpack::rollout
