#include "rollout/engine/replica.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/registry.h"
#include "rollout/model/checkpoint.h"

namespace rollpack::rollout {
namespace {

DType compute_dtype(const Config& config) {
  return config.model.dtype == "float32" ? DType::kF32 : DType::kBF16;
}

Speculation speculation_of(const EngineSection& engine) {
  if (engine.speculation == "off") return Speculation::kOff;
  return engine.speculation == "on" ? Speculation::kOn : Speculation::kAuto;
}

}  // namespace

std::unique_ptr<kernels::Backend> configured_backend(const Config& config, const ModelConfig& model,
                                                     const ReplicaOptions& options) {
  const EngineSection& engine = config.engine;
  const kernels::ModelShape shape = model.shape(compute_dtype(config));
  auto backend = kernels::make_backend(engine.backend, shape,
                                       {.num_threads = options.num_threads,
                                        .num_processes = options.cpus.num_processes,
                                        .process_index = options.cpus.index,
                                        .rank_on_node = options.rank_on_node,
                                        .kv_cache_bytes = engine.kv_cache_memory,
                                        .max_num_seqs = engine.max_num_seqs,
                                        .max_num_batched_tokens = engine.max_num_batched_tokens,
                                        .shared_weights = options.shared_weights,
                                        .enforce_eager = engine.enforce_eager,
                                        .cpu_amx = engine.cpu_amx,
                                        .communicator = options.communicator,
                                        .device_link = options.device_link});
  if (engine.cpu_amx && backend->info().name != "cpu") {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "engine.cpu_amx",
                 .value = "true",
                 .origin = "engine.backend " + engine.backend,
                 .allowed = "false with backend " + backend->info().name});
  }
  if (!options.profiles) return backend;
  return std::make_unique<kernels::ProfiledBackend>(std::move(backend), shape);
}

Replica::Replica(const Config& config, const ModelConfig& model, const ReplicaOptions& options)
    : Replica(config, model, configured_backend(config, model, options), options.communicator) {}

Replica::Replica(const Config& config, const ModelConfig& model,
                 std::unique_ptr<kernels::Backend> backend,
                 std::shared_ptr<kernels::Communicator> communicator)
    : config_(config),
      model_(model),
      communicator_(std::move(communicator)),
      backend_(std::move(backend)),
      profiled_(dynamic_cast<kernels::ProfiledBackend*>(backend_.get())) {
  const EngineSection& engine = config.engine;
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
             .wants_entropy = std::ranges::find(columns, "entropy") != columns.end(),
             .speculation = speculation_of(engine),
             .num_speculative_tokens = engine.num_speculative_tokens};
  const kernels::ReplicaRank at = communicator_ ? communicator_->at() : kernels::ReplicaRank{};
  weights_ = std::make_unique<ModelWeights>(model_, *backend_, at);
  // No sequence is longer than the pages there are.
  const int64_t num_positions =
      std::min(model.max_position_embeddings, static_cast<int64_t>(kv.num_pages) * kv.page_tokens);
  transformer_ = std::make_shared<Transformer>(model_, *weights_, *backend_, compute_dtype(config),
                                               engine.max_num_batched_tokens, num_positions, at);
  backend_->set_program(transformer_);
}

DType Replica::dtype() const {
  return compute_dtype(config_);
}

kernels::StepProfile Replica::take_profile() {
  return profiled_ == nullptr ? kernels::StepProfile{} : profiled_->take();
}

Replica::~Replica() {
  try {
    backend_->sync();
  } catch (const std::exception&) {
    // What went wrong with a step is told to who waits for it.
  }
}

void Replica::load_checkpoint() {
  if (config_.model.load_format == "dummy") {
    weights_->load_dummy();
  } else {
    weights_->load(*open_checkpoint(config_.model.path));
  }
}

}  // namespace rollpack::rollout
