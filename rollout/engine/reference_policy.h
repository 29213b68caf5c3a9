// The frozen policy that the trainer compares with (the KL term of PPO and GRPO): a second model
// beside the live one, which gives each finished sample the log-probabilities of its tokens.
// Used from one thread, the worker's.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_map>

#include "rollout/config/config.h"
#include "rollout/engine/engine.h"
#include "rollout/engine/replica.h"
#include "rollout/model/model_config.h"

namespace rollpack::rollout {

class ReferencePolicy : private EngineOutput {
 public:
  // `replica` has its weights committed. `finished` gets every sample that add() took, with
  // ref_log_prob, from inside step(), add() or give_up(); `failed` those it cannot score.
  ReferencePolicy(std::unique_ptr<Replica> replica, std::function<void(bridge::Sample)> finished,
                  std::function<void(bridge::FailedSample)> failed);

  // Takes a finished sample. Siblings that follow one another share the prefill of their prompt.
  void add(bridge::Sample sample);
  // Hands out every sample that waits, without ref_log_prob. Nothing may be added after it.
  void give_up();

  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }
  // Whether what waits fills a step: worth a step of its own beside samples being drawn.
  bool fills_a_step() const { return num_waiting_tokens_ >= max_step_tokens_; }
  // Its weights are the checkpoint's and nobody sends them again, so they are always kept.
  // Errors: those of Engine::finish_steps and of Engine::sleep.
  void sleep(std::chrono::milliseconds timeout, const std::function<bool()>& is_interrupted);
  void wake_up(kernels::MemoryTags tags) { engine_.wake_up(tags); }
  int64_t held_bytes() const { return replica_->backend().held_bytes(); }

  int64_t num_layers_run() const { return replica_->num_layers_run(); }
  // One step. Errors: those of Engine::step.
  Engine::StepOutcome step(std::chrono::milliseconds timeout,
                           const std::function<bool()>& is_interrupted);

 private:
  void on_sample(bridge::Sample sample) override;
  void on_failed(bridge::FailedSample sample) override;
  void on_scored(uint64_t ticket, bridge::Outcome error, bridge::ScoredSequence scored) override;
  bridge::Sample take(uint64_t ticket);

  std::unique_ptr<Replica> replica_;
  const std::function<void(bridge::Sample)> finished_;
  const std::function<void(bridge::FailedSample)> failed_;
  Engine engine_;
  std::unordered_map<uint64_t, bridge::Sample> waiting_;  // by ticket
  uint64_t next_ticket_ = 1;
  int64_t num_waiting_tokens_ = 0;
  const int64_t max_step_tokens_;
};

// The replica of `config.reference_model` for a rank of `num_threads` threads, weights loaded and
// committed; null where the configuration names none.
// Errors: invalid_argument naming reference_model.path where its vocabulary is not `live`'s or it
// cannot hold a prompt and a response; those of reading a model.
std::unique_ptr<Replica> make_reference_replica(const Config& config, const ModelConfig& live,
                                                int32_t num_threads);

}  // namespace rollpack::rollout
