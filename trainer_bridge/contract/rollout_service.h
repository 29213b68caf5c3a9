// What trainer_bridge asks of rollout. The server calls it from its one thread and never waits:
// answers come through callbacks, at once or later, on any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/base/error.h"
#include "trainer_bridge/contract/sample.h"

namespace rollpack::bridge {

class PeerMemory;  // trainer_bridge/shared_memory/peer_memory.h

// Sampling keys a request may override; what is absent comes from the configuration.
struct SamplingOverrides {
  std::optional<float> temperature;
  std::optional<int32_t> top_k;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<uint64_t> seed;
  std::optional<int32_t> response_length;
  std::optional<int32_t> min_tokens;
  std::optional<std::vector<int32_t>> stop_token_ids;
  std::optional<bool> ignore_eos;
};

struct PromptRequest {
  std::optional<PromptId> prompt_id;  // absent: its index in the submit
  std::vector<int32_t> input_ids;
  std::optional<int32_t> n;
  SamplingOverrides sampling;
  std::string origin;  // for errors: "prompts.jsonl:12", "submit prompts[3]"
};

struct ScoreSequence {
  PromptId id;
  std::vector<int32_t> input_ids;
  std::vector<int32_t> response_ids;
  float temperature = 1.0f;
  std::string origin;
};

// One entry a response token.
struct ScoredSequence {
  PromptId id;
  std::vector<float> logprobs, scaled_logprobs, entropy;
};

// What becomes of samples in flight when weights switch or generation pauses.
enum class InFlight : uint8_t {
  kKeep,   // go on under the new weights, KV recomputed
  kWait,   // finish under the old weights first
  kAbort,  // handed back as partial samples with finish_reason abort
};

// What an update turns the weights into.
struct WeightUpdate {
  int64_t version = 0;
  // Set: only some tensors come, the others stay as they are in this version, the current one.
  std::optional<int64_t> base_version;
};

// One tensor of a weight update.
struct WeightTensor {
  std::string name;
  DType dtype = DType::kF32;  // kF32, kF16 or kBF16
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;  // none where the chunk is lent
  uint64_t address = 0;              // in the lender's memory
};

// Tensors of one sealed memfd, checked; valid until the callback of their stage_weights() was
// called. Other processes of the node map `fd` themselves: a tensor's offset there is its distance
// from the start of `mapping`. Or tensors that their sender lends for as long: they are read where
// they lie in its memory, by this process alone.
struct WeightChunk {
  int fd = -1;
  std::span<const std::byte> mapping;
  std::vector<WeightTensor> tensors;
  std::shared_ptr<const PeerMemory> lender;
};

// std::nullopt: done. Otherwise what went wrong.
using Outcome = std::optional<ErrorInfo>;
using OutcomeCallback = std::function<void(Outcome)>;
// With an error the value counts for nothing.
template <class Value>
using Answer = std::function<void(Outcome, Value)>;

// The weights that samples are drawn with, and what the update that brought them cost.
struct WeightsInUse {
  int64_t version = 0;
  uint64_t hash = 0;  // of the packed weights, which every rank has said it uses
  // Of the rank that stood still longest, while it had work: for packing, and for all else but the
  // prefill of live samples, which follows the switch.
  double packing_ms = 0;
  double pause_ms = 0;
};

// Parts of the engines' memory, each asleep or not, by vLLM's names.
struct MemoryTags {
  bool weights = false;
  bool kv_cache = false;

  bool any() const { return weights || kv_cache; }
};

// Whose memory is given back to the system until wake_up().
struct SleepState {
  MemoryTags asleep;
  // sleep(level=2) has dropped the weights, and nothing is generated until a whole update has come.
  bool needs_weights = false;
  // By all ranks, as they told last: weights, KV pages, buffers.
  int64_t held_bytes = 0;

  bool is_awake() const { return !asleep.any() && !needs_weights; }
};

// What hello says about the engine; fixed for its life but for weight_version.
struct ServiceInfo {
  std::string resolved_config_json;
  std::vector<int32_t> eos_token_ids;
  int32_t pad_token_id = 0;  // pad_token_id, else the lowest EOS id: written, never read
  int64_t vocab_size = 0;
  std::string fingerprint;  // equal fingerprints give equal bits
  // Length at which a sequence's attention costs as many FLOPs as its linear layers, the head
  // included; what micro-batches are balanced by.
  int64_t attention_parity_tokens = 0;
};

class RolloutService {
 public:
  virtual ~RolloutService() = default;

  virtual ServiceInfo info() const = 0;

  // Accepts all prompts or none and answers with the request id, at once or before any sample of it
  // is put into the sink. `done` may not call the service.
  // While asleep it accepts as ever.
  // Errors, thrown or answered: invalid_argument naming the prompt's field; would_block when queues
  // are full; failed_precondition after sleep(level=2), until weights have come.
  virtual void submit(std::vector<PromptRequest> prompts, Answer<int64_t> done) = 0;
  // Ends the samples of one request, or of all that came from this server; they reach the sink as
  // partial samples. Answers how many were still open.
  virtual void abort(std::optional<int64_t> request_id, Answer<int64_t> done) = 0;
  virtual void pause(InFlight in_flight, OutcomeCallback done) = 0;
  virtual void resume() = 0;
  // Gives memory back until wake_up(): keys and values, cached ones too, at both levels; at level 2
  // the weights as well. Samples that are kept go on from the tokens they have. Calls are carried
  // out one after the other; they outlive their client. Answers with the state that follows.
  // Errors: failed_precondition while weights are updated; would_block for too many calls at once;
  // resource_exhausted where a rank could not take its memory again: it sleeps on, try again.
  virtual void sleep(int level, InFlight in_flight, Answer<SleepState> done) = 0;
  virtual void wake_up(MemoryTags tags, Answer<SleepState> done) = 0;
  virtual SleepState sleep_state() const = 0;
  virtual void score(std::vector<ScoreSequence> sequences,
                     Answer<std::vector<ScoredSequence>> done) = 0;

  // Weights in two phases: begin, stage any number of times, then commit or cancel. A refused
  // stage or commit cancels the update; the old version goes on, bit-unchanged.
  // Errors of begin: invalid_argument for a version not above the current one, or a base that is
  // not the current one; failed_precondition while the weights sleep, or for a base after
  // sleep(level=2).
  virtual void begin_weights(WeightUpdate update, OutcomeCallback done) = 0;
  virtual void stage_weights(WeightChunk chunk, OutcomeCallback done) = 0;
  // Whether stage_weights() takes lent chunks: no other process needs them, now or later.
  virtual bool takes_lent_weights() const = 0;
  virtual void commit_weights(InFlight in_flight, OutcomeCallback done) = 0;
  virtual void cancel_weights() = 0;
  virtual int64_t weight_version() const = 0;
  virtual void find_weights(Answer<WeightsInUse> done) = 0;
  // After a restart: the version that must be current before anything is generated, unless resume()
  // is called. nullopt: none, as ever.
  virtual std::optional<int64_t> awaited_weight_version() const { return std::nullopt; }

  // Counters and gauges by name, e.g. "num_running_seqs".
  using Numbers = std::vector<std::pair<std::string, double>>;
  virtual void find_stats(Answer<Numbers> done) = 0;
  // An error once the service can make no more samples.
  virtual Outcome health() const = 0;
  // Asks the whole program to end; returns at once.
  virtual void shutdown() = 0;
};

}  // namespace rollpack::bridge
