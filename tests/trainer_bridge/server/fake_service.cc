#include "tests/trainer_bridge/server/fake_service.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <set>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"
#include "trainer_bridge/shared_memory/peer_memory.h"

namespace rollpack::bridge {
namespace {

float fake_logprob(size_t token) {
  return -0.5f - static_cast<float>(token) / 64.0f;
}

[[noreturn]] void refuse(const std::string& origin, std::string field, std::string value,
                         std::string allowed) {
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = std::move(field),
               .value = std::move(value),
               .origin = origin,
               .allowed = std::move(allowed)});
}

void check_ids(const std::vector<int32_t>& ids, const std::string& origin) {
  if (ids.empty()) refuse(origin, "input_ids", "0 tokens", "at least one token");
  for (const int32_t id : ids) {
    if (id < 0 || id >= kFakeVocab) {
      refuse(origin, "input_ids", std::to_string(id), "token ids from 0 to 63");
    }
  }
}

void check_prompt(const PromptRequest& prompt) {
  check_ids(prompt.input_ids, prompt.origin);
  if (prompt.n.value_or(1) < 1) {
    refuse(prompt.origin, "n", std::to_string(*prompt.n), "an integer of at least 1");
  }
  if (prompt.sampling.response_length.value_or(1) < 1) {
    refuse(prompt.origin, "sampling.response_length",
           std::to_string(*prompt.sampling.response_length), "an integer of at least 1");
  }
  if (prompt.sampling.temperature.value_or(1.0f) < 0.0f) {
    refuse(prompt.origin, "sampling.temperature", fmt::format("{}", *prompt.sampling.temperature),
           "0 or more");
  }
}

}  // namespace

std::vector<int32_t> fake_response(const std::vector<int32_t>& prompt, int32_t sample_index,
                                   int32_t length) {
  const int64_t sum = std::accumulate(prompt.begin(), prompt.end(), int64_t{0});
  std::vector<int32_t> response;
  for (int32_t i = 0; i < length; ++i) {
    response.push_back(static_cast<int32_t>((sum + sample_index + i) % kFakeVocab));
  }
  return response;
}

const std::map<std::string, std::vector<int64_t>>& fake_tensors() {
  static const std::map<std::string, std::vector<int64_t>> kTensors = {
      {"model.embed_tokens.weight", {8, 4}},
      {"model.norm.weight", {4}},
      {"lm_head.weight", {8, 4}},
  };
  return kTensors;
}

FakeService::FakeService(FakeOptions options, SampleSink& sink)
    : options_(options), sink_(sink), worker_([this] { run(); }) {}

FakeService::~FakeService() {
  {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
  }
  changed_.notify_all();
  worker_.join();
}

ServiceInfo FakeService::info() const {
  return {.resolved_config_json = fmt::format(
              R"({{"rollout":{{"n":{},"response_length":{}}},"engine":{{"backend":"fake"}}}})",
              options_.n, options_.response_length),
          .eos_token_ids = {kFakeEos},
          .pad_token_id = 0,
          .vocab_size = kFakeVocab,
          .fingerprint = "fake",
          .attention_parity_tokens = kFakeParityTokens};
}

int64_t FakeService::submit(std::vector<PromptRequest> prompts) {
  std::set<std::string> ids;
  for (size_t p = 0; p < prompts.size(); ++p) {
    check_prompt(prompts[p]);
    if (!prompts[p].prompt_id) prompts[p].prompt_id = PromptId{std::to_string(p), true};
    if (!ids.insert(prompts[p].prompt_id->text).second) {
      refuse(prompts[p].origin, "prompt_id", prompts[p].prompt_id->text, "each id once");
    }
  }
  std::unique_lock lock(mutex_);
  if (static_cast<int64_t>(queue_.size()) >= options_.max_open_samples) {
    throw Error({.code = ErrorCode::kWouldBlock,
                 .field = "open samples",
                 .value = std::to_string(queue_.size()),
                 .message = "take batches, then try again"});
  }
  const int64_t request_id = ++last_request_id_;
  for (size_t p = 0; p < prompts.size(); ++p) {
    const auto ids_of_prompt =
        std::make_shared<const std::vector<int32_t>>(std::move(prompts[p].input_ids));
    const int32_t n = prompts[p].n.value_or(options_.n);
    for (int32_t s = 0; s < n; ++s) {
      queue_.push_back({{request_id, static_cast<int32_t>(p), *prompts[p].prompt_id, s, n},
                        ids_of_prompt,
                        prompts[p].sampling});
    }
  }
  lock.unlock();
  changed_.notify_all();
  return request_id;
}

void FakeService::run() {
  std::unique_lock lock(mutex_);
  while (!is_stopping_) {
    if (settling_ && !is_working_ && queue_.empty()) {
      const auto [done, pauses] = *std::exchange(settling_, std::nullopt);
      is_paused_ = pauses;
      lock.unlock();
      done(std::nullopt);
      lock.lock();
      continue;
    }
    if ((is_paused_ && !settling_) || queue_.empty()) {
      changed_.wait(lock);
      continue;
    }
    const Work work = std::move(queue_.front());
    queue_.pop_front();
    is_working_ = true;
    ++num_samples_;  // counted before anyone can have it
    const int64_t version = version_;
    if (options_.sample_time.count() > 0) {
      changed_.wait_for(lock, options_.sample_time, [this] { return is_stopping_; });
    }
    lock.unlock();
    finish(work, /*is_aborted=*/false, version);
    lock.lock();
    is_working_ = false;
  }
}

void FakeService::finish(const Work& work, bool is_aborted, int64_t version) {
  if (work.prompt_ids->front() == kFakeVocab - 1) {
    return sink_.fail({work.key,
                       {.code = ErrorCode::kNonFinite,
                        .field = "logits",
                        .value = "nan",
                        .origin = fmt::format("prompt {}", work.key.prompt_id.text),
                        .message = "a number became infinite or undefined"}});
  }
  const int32_t length = work.sampling.response_length.value_or(options_.response_length);
  Sample sample{.key = work.key, .prompt_ids = work.prompt_ids};
  sample.finish_reason = is_aborted ? FinishReason::kAbort : FinishReason::kLength;
  sample.response_ids =
      fake_response(*work.prompt_ids, work.key.sample_index, is_aborted ? length / 2 : length);
  if (const auto& stops = work.sampling.stop_token_ids; stops && !is_aborted) {
    const auto end = std::find_first_of(sample.response_ids.begin(), sample.response_ids.end(),
                                        stops->begin(), stops->end());
    if (end != sample.response_ids.end()) {
      sample.finish_reason = FinishReason::kStop;
      sample.stop_token_id = *end;
      auto& ids = sample.response_ids.own();
      ids.erase(ids.begin() + (end + 1 - sample.response_ids.begin()), ids.end());
    }
  }
  for (size_t i = 0; i < sample.response_ids.size(); ++i) {
    sample.logprobs.own().push_back(fake_logprob(i));
    if (options_.with_entropy) sample.entropy.own().push_back(1.0f);
  }
  sample.scaled_logprobs = sample.logprobs;
  sample.support_logmass.own().assign(sample.logprobs.size(), 0.0f);
  sample.temperature = work.sampling.temperature.value_or(1.0f);
  if (!sample.response_ids.empty()) sample.weight_versions = {{0, version}};
  sink_.commit(std::move(sample));
}

std::vector<FakeService::Work> FakeService::take_open(std::optional<int64_t> request_id) {
  std::vector<Work> taken;
  std::erase_if(queue_, [&](Work& work) {
    if (request_id && work.key.request_id != *request_id) return false;
    taken.push_back(work);
    return true;
  });
  return taken;
}

void FakeService::hand_back(const std::vector<Work>& aborted) {
  for (const Work& work : aborted) finish(work, /*is_aborted=*/true, weight_version());
}

int64_t FakeService::abort(std::optional<int64_t> request_id) {
  std::unique_lock lock(mutex_);
  if (request_id && (*request_id < 1 || *request_id > last_request_id_)) {
    throw Error({.code = ErrorCode::kNotFound,
                 .field = "request_id",
                 .value = std::to_string(*request_id),
                 .origin = "abort"});
  }
  const std::vector<Work> taken = take_open(request_id);
  lock.unlock();
  hand_back(taken);
  changed_.notify_all();
  return static_cast<int64_t>(taken.size());
}

void FakeService::pause(InFlight in_flight, OutcomeCallback done) {
  if (in_flight == InFlight::kAbort) abort(std::nullopt);
  {
    const std::lock_guard lock(mutex_);
    if (in_flight == InFlight::kKeep) {
      is_paused_ = true;
    } else {
      settling_ = {std::move(done), true};
    }
  }
  changed_.notify_all();
  if (in_flight == InFlight::kKeep) done(std::nullopt);
}

void FakeService::resume() {
  {
    const std::lock_guard lock(mutex_);
    is_paused_ = false;
  }
  changed_.notify_all();
}

void FakeService::sleep(int level, InFlight in_flight, Answer<SleepState> done) {
  {
    const std::lock_guard lock(mutex_);
    sleep_ = {.asleep = {.weights = true, .kv_cache = true},
              .needs_weights = sleep_.needs_weights || level == 2,
              .held_bytes = 400};
  }
  pause(in_flight,
        [this, done = std::move(done)](const Outcome& outcome) { done(outcome, sleep_state()); });
}

void FakeService::wake_up(MemoryTags tags, Answer<SleepState> done) {
  bool is_awake = false;
  {
    const std::lock_guard lock(mutex_);
    if (tags.weights && std::exchange(sleep_.asleep.weights, false)) sleep_.held_bytes += 300;
    if (tags.kv_cache && std::exchange(sleep_.asleep.kv_cache, false)) sleep_.held_bytes += 300;
    is_awake = sleep_.is_awake();
  }
  if (is_awake) resume();
  done(std::nullopt, sleep_state());
}

SleepState FakeService::sleep_state() const {
  const std::lock_guard lock(mutex_);
  return sleep_;
}

void FakeService::score(std::vector<ScoreSequence> sequences,
                        std::function<void(Outcome, std::vector<ScoredSequence>)> done) {
  std::vector<ScoredSequence> results;
  for (const ScoreSequence& sequence : sequences) {
    check_ids(sequence.input_ids, sequence.origin);
    ScoredSequence result{.id = sequence.id};
    for (size_t i = 0; i < sequence.response_ids.size(); ++i) {
      result.logprobs.push_back(fake_logprob(i));
    }
    result.scaled_logprobs = result.logprobs;
    result.entropy.assign(result.logprobs.size(), 1.0f);
    results.push_back(std::move(result));
  }
  done(std::nullopt, std::move(results));
}

void FakeService::begin_weights(WeightUpdate update, OutcomeCallback done) {
  {
    const std::lock_guard lock(mutex_);
    next_version_ = update.version;
    staged_.clear();
    if (update.base_version) staged_ = fake_tensors();
  }
  done(std::nullopt);
}

// A lent tensor is read, as it would be where it is packed.
Outcome FakeService::failure_to_read(const WeightTensor& tensor, const PeerMemory& lender) {
  int64_t num_bytes = dtype_bytes(tensor.dtype);
  for (const int64_t extent : tensor.shape) num_bytes *= extent;
  std::vector<std::byte> bytes(static_cast<size_t>(num_bytes));
  try {
    lender.read(tensor.address, bytes);
  } catch (const Error& error) {
    next_version_.reset();
    return error.info;
  }
  lent_crc32_[tensor.name] = crc32_of(bytes);
  return std::nullopt;
}

void FakeService::stage_weights(WeightChunk chunk, OutcomeCallback done) {
  Outcome outcome;
  {
    const std::lock_guard lock(mutex_);
    for (const WeightTensor& tensor : chunk.tensors) {
      const auto known = fake_tensors().find(tensor.name);
      if (known == fake_tensors().end() || known->second != tensor.shape) {
        outcome =
            ErrorInfo{.code = ErrorCode::kInvalidArgument,
                      .field = tensor.name,
                      .value = fmt::format("shape [{}]", fmt::join(tensor.shape, ", ")),
                      .origin = "update_weights chunk",
                      .allowed = known == fake_tensors().end()
                                     ? "a tensor of the model"
                                     : fmt::format("shape [{}]", fmt::join(known->second, ", "))};
        next_version_.reset();
        break;
      }
      staged_[tensor.name] = tensor.shape;
      if (chunk.lender && (outcome = failure_to_read(tensor, *chunk.lender))) break;
    }
  }
  done(outcome);
}

void FakeService::commit_weights(InFlight in_flight, OutcomeCallback done) {
  std::vector<Work> aborted;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [name, shape] : fake_tensors()) {
      if (staged_.contains(name)) continue;
      next_version_.reset();
      return done(ErrorInfo{.code = ErrorCode::kInvalidArgument,
                            .field = name,
                            .origin = "update_weights commit",
                            .message = "missing: every tensor of the model must be sent"});
    }
    if (in_flight == InFlight::kAbort) aborted = take_open(std::nullopt);
  }
  hand_back(aborted);
  const OutcomeCallback switch_version = [this, done = std::move(done)](Outcome) {
    {
      const std::lock_guard lock(mutex_);
      version_ = *std::exchange(next_version_, std::nullopt);
    }
    done(std::nullopt);
  };
  if (in_flight != InFlight::kWait) return switch_version(std::nullopt);
  {
    const std::lock_guard lock(mutex_);
    settling_ = {switch_version, is_paused_};
  }
  changed_.notify_all();
}

void FakeService::cancel_weights() {
  const std::lock_guard lock(mutex_);
  next_version_.reset();
  ++num_cancelled_updates_;
}

int64_t FakeService::weight_version() const {
  const std::lock_guard lock(mutex_);
  return version_;
}

WeightsInUse FakeService::weights_in_use() const {
  const int64_t version = weight_version();
  return {.version = version,
          .hash = static_cast<uint64_t>(version),
          .packing_ms = 1.5,
          .pause_ms = 0.25};
}

int64_t FakeService::num_cancelled_updates() const {
  const std::lock_guard lock(mutex_);
  return num_cancelled_updates_;
}

RolloutService::Numbers FakeService::stats() const {
  const std::lock_guard lock(mutex_);
  return {{"num_waiting_seqs", static_cast<double>(queue_.size())},
          {"num_samples", static_cast<double>(num_samples_)}};
}

Outcome FakeService::health() const {
  const std::lock_guard lock(mutex_);
  return health_;
}

void FakeService::set_health(Outcome outcome) {
  const std::lock_guard lock(mutex_);
  health_ = std::move(outcome);
}

void FakeService::shutdown() {
  on_shutdown();
}

}  // namespace rollpack::bridge
