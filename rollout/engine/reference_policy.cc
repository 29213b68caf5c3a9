#include "rollout/engine/reference_policy.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "kernels/base/error.h"

namespace rollpack::rollout {

ReferencePolicy::ReferencePolicy(std::unique_ptr<Replica> replica,
                                 std::function<void(bridge::Sample)> finished,
                                 std::function<void(bridge::FailedSample)> failed)
    : replica_(std::move(replica)),
      finished_(std::move(finished)),
      failed_(std::move(failed)),
      engine_(replica_->limits(), make_batching_policy("continuous"), replica_->backend(), *this),
      max_step_tokens_(replica_->limits().max_num_batched_tokens) {}

void ReferencePolicy::add(bridge::Sample sample) {
  if (sample.response_ids.empty()) return finished_(std::move(sample));
  // A temperature of 0 scores at 1, as the live policy does.
  bridge::ScoreSequence sequence{.id = sample.key.prompt_id,
                                 .input_ids = *sample.prompt_ids,
                                 .response_ids = sample.response_ids,
                                 .temperature = sample.temperature,
                                 .origin = "reference_model"};
  const bridge::Outcome refused =
      check_score(sequence, replica_->limits(), replica_->model().vocab_size);
  if (refused) return failed_({.key = std::move(sample.key), .error = *refused});
  const uint64_t ticket = next_ticket_++;
  num_waiting_tokens_ +=
      static_cast<int64_t>(sequence.input_ids.size() + sequence.response_ids.size());
  waiting_.emplace(ticket, std::move(sample));
  engine_.add_score({.ticket = ticket, .sequence = std::move(sequence)});
}

Engine::StepOutcome ReferencePolicy::step(std::chrono::milliseconds timeout,
                                          const std::function<bool()>& is_interrupted) {
  return engine_.step(timeout, is_interrupted);
}

void ReferencePolicy::sleep(std::chrono::milliseconds timeout,
                            const std::function<bool()>& is_interrupted) {
  engine_.finish_steps(timeout, is_interrupted);
  engine_.sleep(/*level=*/1);
}

void ReferencePolicy::give_up() {
  std::vector<uint64_t> tickets;  // in the order of their ends
  for (const auto& [ticket, sample] : waiting_) tickets.push_back(ticket);
  std::ranges::sort(tickets);
  for (const uint64_t ticket : tickets) finished_(take(ticket));
}

bridge::Sample ReferencePolicy::take(uint64_t ticket) {
  auto node = waiting_.extract(ticket);
  bridge::Sample sample = std::move(node.mapped());
  num_waiting_tokens_ -=
      static_cast<int64_t>(sample.prompt_ids->size() + sample.response_ids.size());
  return sample;
}

void ReferencePolicy::on_scored(uint64_t ticket, bridge::Outcome error,
                                bridge::ScoredSequence scored) {
  bridge::Sample sample = take(ticket);
  if (error) return failed_({.key = std::move(sample.key), .error = *error});
  sample.ref_log_prob = std::move(scored.scaled_logprobs);
  finished_(std::move(sample));
}

// It draws nothing of its own.
void ReferencePolicy::on_sample(bridge::Sample) {}
void ReferencePolicy::on_failed(bridge::FailedSample) {}

std::unique_ptr<Replica> make_reference_replica(const Config& config, const ModelConfig& live,
                                                int32_t num_threads) {
  const ReferenceModelSection& section = config.reference_model;
  if (section.path.empty()) return nullptr;
  const ModelConfig model = read_model_config(section.path);
  const auto refuse = [&](std::string what, std::string allowed) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "reference_model.path",
                 .value = section.path,
                 .origin = config.origin_of("reference_model.path"),
                 .allowed = std::move(allowed),
                 .message = std::move(what)});
  };
  if (model.vocab_size != live.vocab_size) {
    refuse(fmt::format("its vocab_size is {}", model.vocab_size),
           fmt::format("a model of model.path's vocabulary, {} tokens", live.vocab_size));
  }
  const int64_t longest =
      std::min(live.max_position_embeddings,
               int64_t{config.rollout.prompt_length} + config.rollout.response_length);
  if (model.max_position_embeddings < longest) {
    refuse(fmt::format("its max_position_embeddings is {}", model.max_position_embeddings),
           fmt::format("at least {} positions, a prompt and its response", longest));
  }
  Config own = config;
  own.model.path = section.path;
  own.engine.kv_cache_memory = section.kv_cache_memory;
  own.bridge.columns.clear();  // nobody reads its entropy
  auto replica = std::make_unique<Replica>(own, model, ReplicaOptions{.num_threads = num_threads});
  replica->load_checkpoint();
  replica->backend().commit_weights();
  return replica;
}

}  // namespace rollpack::rollout
