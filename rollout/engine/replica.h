// Everything one rank needs to generate: model, backend, weights, forward pass and limits, built
// from the configuration. Staging of new weights goes through here, so that names and shapes are
// checked.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/profile/profiled_backend.h"
#include "kernels/usable_cores.h"
#include "rollout/config/config.h"
#include "rollout/engine/engine_state.h"
#include "rollout/model/model_config.h"
#include "rollout/model/transformer.h"
#include "rollout/model/weights.h"

namespace rollpack::rollout {

struct ReplicaOptions {
  int32_t num_threads = 1;
  kernels::CpuSharing cpus;  // the processes that compute on the same CPUs
  int32_t rank_on_node = 0;  // whose device it takes, where it computes on one
  bool shared_weights = false;
  bool profiles = false;  // times every op; see take_profile()
  // Of the ranks that hold the model together; none: this one holds it alone.
  std::shared_ptr<kernels::Communicator> communicator;
  // By which their devices reach each other, where they compute on devices: kernels/registry.h.
  std::vector<std::byte> device_link;
};

// The backend that engine.backend names, for this rank of a replica.
std::unique_ptr<kernels::Backend> configured_backend(const Config& config, const ModelConfig& model,
                                                     const ReplicaOptions& options);

class Replica {
 public:
  // Allocates KV and activations; weights are staged by load_checkpoint() or adopted from a peer.
  Replica(const Config& config, const ModelConfig& model, const ReplicaOptions& options);
  // The same over a backend that the caller has made, whatever engine.backend says.
  Replica(const Config& config, const ModelConfig& model, std::unique_ptr<kernels::Backend> backend,
          std::shared_ptr<kernels::Communicator> communicator = nullptr);
  // Waits for steps that nobody has waited for: they read weights and activations to their end.
  ~Replica();

  // Stages the tensors of model.path; the caller commits.
  void load_checkpoint();

  const Config& config() const { return config_; }
  const ModelConfig& model() const { return model_; }
  DType dtype() const;  // of weights, matrix products and KV cache
  const EngineLimits& limits() const { return limits_; }
  const kernels::BackendInfo& backend_info() const { return backend_->info(); }
  const std::string& backend_description() const { return backend_info().description; }
  kernels::Backend& backend() { return *backend_; }
  // Where the time of steps went since the last call; empty unless options.profiles.
  kernels::StepProfile take_profile();
  ModelWeights& weights() { return *weights_; }
  // Time that this rank has spent in steps exchanging columns with the others that hold the model,
  // and waiting for them. Any thread.
  double communication_s() const { return backend_->communication_s(); }
  // Grows while a step computes. Any thread.
  int64_t num_layers_run() const { return transformer_->num_layers_run(); }

 private:
  const Config config_;
  const ModelConfig model_;
  const std::shared_ptr<kernels::Communicator> communicator_;
  EngineLimits limits_;
  std::unique_ptr<kernels::Backend> backend_;
  kernels::ProfiledBackend* profiled_ = nullptr;  // backend_, where ops are timed
  std::unique_ptr<ModelWeights> weights_;
  // The program uses backend and weights: declared last, gone first.
  std::shared_ptr<Transformer> transformer_;
};

}  // namespace rollpack::rollout
