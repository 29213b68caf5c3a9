#include "rollout/engine/replica.h"

#include <algorithm>

#include "kernels/registry.h"
#include "rollout/model/checkpoint.h"

namespace rollpack::rollout {

Replica::Replica(const Config& config, const ModelConfig& model, const ReplicaOptions& options)
    : config_(config), model_(model) {
  const EngineSection& engine = config.engine;
  const DType dtype = config.model.dtype == "float32" ? DType::kF32 : DType::kBF16;
  backend_ = kernels::make_backend(engine.backend, model.shape(dtype),
                                   {.num_threads = options.num_threads,
                                    .kv_cache_bytes = engine.kv_cache_memory,
                                    .max_num_seqs = engine.max_num_seqs,
                                    .max_num_batched_tokens = engine.max_num_batched_tokens,
                                    .shared_weights = options.shared_weights});
  const kernels::KvLayout& kv = backend_->info().kv;
  const auto& columns = config.bridge.columns;
  limits_ = {.max_num_seqs = engine.max_num_seqs,
             .max_num_batched_tokens = engine.max_num_batched_tokens,
             .page_tokens = kv.page_tokens,
             .num_pages = kv.num_pages,
             .page_bytes = kv.page_bytes,
             .max_positions = model.max_position_embeddings,
             .chunked_prefill = engine.enable_chunked_prefill,
             .prefix_sharing = engine.enable_prefix_caching,
             .wants_entropy = std::ranges::find(columns, "entropy") != columns.end()};
  weights_ = std::make_unique<ModelWeights>(model_, *backend_);
  // No sequence is longer than the pages there are.
  const int64_t num_positions =
      std::min(model.max_position_embeddings, static_cast<int64_t>(kv.num_pages) * kv.page_tokens);
  transformer_ = std::make_shared<Transformer>(model_, *weights_, *backend_, dtype,
                                               engine.max_num_batched_tokens, num_positions);
  backend_->set_program(transformer_);
}

void Replica::load_checkpoint() {
  weights_->load(*open_checkpoint(config_.model.path));
}

}  // namespace rollpack::rollout
