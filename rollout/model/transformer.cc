#include "rollout/model/transformer.h"

#include <vector>

#include "kernels/base/fault_point.h"
#include "rollout/model/rope_table.h"

namespace rollpack::rollout {

using kernels::Buffer;
using kernels::Epilogue;
using kernels::Tensor;

Transformer::Transformer(const ModelConfig& config, const ModelWeights& weights,
                         kernels::Backend& backend, DType dtype, int64_t max_rows,
                         int64_t num_positions, kernels::ReplicaRank at)
    : config_(config),
      weights_(weights),
      backend_(backend),
      dtype_(dtype),
      num_positions_(num_positions),
      at_(at) {
  const int64_t D = config.hidden_size, K = config.head_dim;
  const int64_t H = config.num_attention_heads, G = config.num_key_value_heads;
  const kernels::HeadShard heads = kernels::head_shard(H, G, at);
  q_cols_ = heads.query.size() * K;
  qkv_cols_ = q_cols_ + 2 * heads.kv.size() * K;
  attended_starts_ = kernels::shard_starts(
      at.size, K, [&](kernels::ReplicaRank rank) { return kernels::head_shard(H, G, rank).query; });
  const auto column_starts = [&](int64_t columns) {
    return kernels::shard_starts(at.size, 1, [&](kernels::ReplicaRank rank) {
      return kernels::column_shard(columns, rank);
    });
  };
  gated_starts_ = column_starts(config.intermediate_size);
  residual_starts_ = column_starts(D);
  const int64_t act = dtype_bytes(dtype_);
  residual_ = backend.alloc(max_rows * D * 4);
  normed_ = backend.alloc(max_rows * D * act);
  qkv_ = backend.alloc(max_rows * qkv_cols_ * 4);
  q_ = backend.alloc(max_rows * q_cols_ * act);
  attended_ = backend.alloc(max_rows * H * K * act);
  gated_ = backend.alloc(max_rows * config.intermediate_size * act);
  head_rows_ = backend.alloc(max_rows * D * 4);
  const std::vector<float> table = make_rope_table(config.rope, K, num_positions);
  rope_table_ = backend.alloc(static_cast<int64_t>(table.size()) * 4);
  backend.upload(rope_table_, table.data(), rope_table_.bytes);
}

Transformer::~Transformer() {
  for (const Buffer& buffer :
       {residual_, normed_, qkv_, q_, attended_, gated_, head_rows_, rope_table_}) {
    backend_.free(buffer);
  }
}

Tensor Transformer::view(const Buffer& buffer, DType dtype, int64_t rows, int64_t cols) const {
  return {.data = buffer.data, .dtype = dtype, .shape = {rows, cols}};
}

Tensor Transformer::gathered(const Tensor& tensor, const std::vector<int64_t>& starts) const {
  if (at_.size > 1) backend_.gather_columns({.tensor = tensor, .starts = starts});
  return tensor;
}

void Transformer::run(kernels::Backend& backend, int64_t num_rows, int64_t num_head_rows) {
  const int64_t D = config_.hidden_size;
  const Tensor residual = view(residual_, DType::kF32, num_rows, D);
  backend.embed({.weight = weights_.embedding, .out = residual});
  for (int64_t layer = 0; layer < config_.num_hidden_layers; ++layer) {
    run_layer(layer, num_rows);
    fault_at(FaultPoint::kLayerRun);
    num_layers_run_.fetch_add(1, std::memory_order_relaxed);
  }
  if (num_head_rows == 0) return;
  const Tensor rows = view(head_rows_, DType::kF32, num_head_rows, D);
  const Tensor normed = view(normed_, dtype_, num_head_rows, D);
  backend.gather_head_rows({.in = residual, .out = rows});
  backend.rms_norm({.weight = weights_.final_norm,
                    .epsilon = static_cast<float>(config_.rms_norm_eps),
                    .in = rows,
                    .out = normed});
  backend.lm_head({.weight = weights_.lm_head, .in = normed});
}

void Transformer::on_replay() {
  fault_at(FaultPoint::kLayerRun);
  num_layers_run_.fetch_add(config_.num_hidden_layers, std::memory_order_relaxed);
}

void Transformer::run_layer(int64_t layer, int64_t num_rows) {
  const LayerWeights& w = weights_.layers[layer];
  const auto epsilon = static_cast<float>(config_.rms_norm_eps);
  const int64_t D = config_.hidden_size, K = config_.head_dim;
  const int64_t all_q_cols = config_.num_attention_heads * K;
  const Tensor residual = view(residual_, DType::kF32, num_rows, D);
  const Tensor normed = view(normed_, dtype_, num_rows, D);
  const Tensor qkv = view(qkv_, DType::kF32, num_rows, qkv_cols_);
  const Tensor q = view(q_, dtype_, num_rows, q_cols_);
  const Tensor attended = view(attended_, dtype_, num_rows, all_q_cols);
  const Tensor gated = view(gated_, dtype_, num_rows, config_.intermediate_size);

  backend_.rms_norm(
      {.weight = w.attention_norm, .epsilon = epsilon, .in = residual, .out = normed});
  backend_.linear({.weight = w.qkv, .bias = w.qkv_bias, .in = normed, .out = qkv});
  backend_.rope_append({.layer = static_cast<int32_t>(layer),
                        .qkv = qkv,
                        .rope_table = view(rope_table_, DType::kF32, num_positions_, K),
                        .q_norm = w.q_norm,
                        .k_norm = w.k_norm,
                        .norm_epsilon = epsilon,
                        .q = q});
  backend_.attention({.layer = static_cast<int32_t>(layer),
                      .window = config_.layer_windows[layer],
                      .q = q,
                      .out = attended,
                      .out_begin = begin_of(attended_starts_)});
  backend_.linear({.weight = w.o,
                   .bias = w.o_bias,
                   .epilogue = Epilogue::kResidual,
                   .in = gathered(attended, attended_starts_),
                   .out = residual,
                   .out_begin = begin_of(residual_starts_)});
  backend_.rms_norm({.weight = w.mlp_norm,
                     .epsilon = epsilon,
                     .in = gathered(residual, residual_starts_),
                     .out = normed});
  backend_.linear({.weight = w.gate_up,
                   .bias = w.gate_up_bias,
                   .epilogue = Epilogue::kGated,
                   .in = normed,
                   .out = gated,
                   .out_begin = begin_of(gated_starts_)});
  backend_.linear({.weight = w.down,
                   .bias = w.down_bias,
                   .epilogue = Epilogue::kResidual,
                   .in = gathered(gated, gated_starts_),
                   .out = residual,
                   .out_begin = begin_of(residual_starts_)});
  gathered(residual, residual_starts_);
}

}  // namespace rollpack::rollout
