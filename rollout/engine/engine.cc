#include "rollout/engine/engine.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <fmt/format.h>

#include "kernels/base/error.h"
#include "kernels/base/fault_point.h"
#include "rollout/batching/drafting.h"

namespace rollpack::rollout {
namespace {

bridge::SampleKey key_of(const Sequence& sequence) {
  bridge::SampleKey key = sequence.group->request.key;
  key.sample_index = sequence.sample_index;
  return key;
}

ErrorInfo non_finite_error(const Sequence& sequence, const char* what) {
  const int32_t position = sequence.num_known();
  return {.code = ErrorCode::kNonFinite,
          .field = what,
          .value = "NaN or infinity",
          .origin = sequence.is_score()
                        ? fmt::format("sequence {}", sequence.score->sequence.id.text)
                        : fmt::format("prompt_id {}, sample_index {}, position {}",
                                      sequence.group->request.key.prompt_id.text,
                                      sequence.sample_index, position),
          .allowed = "finite numbers",
          .message = "check the weights for NaN, infinity or overflow"};
}

}  // namespace

Engine::Engine(const EngineLimits& limits, std::unique_ptr<BatchingPolicy> policy,
               kernels::Backend& backend, EngineOutput& output)
    : state_(limits),
      policy_(std::move(policy)),
      backend_(backend),
      output_(output),
      max_steps_under_way_(static_cast<size_t>(backend.info().max_steps_under_way)) {}

void Engine::add(GroupRequest request) {
  auto group = std::make_shared<Group>();
  group->request = std::move(request);
  const std::vector<int32_t>& prompt = *group->request.prompt_ids;
  for (int32_t i = 0; i < group->request.num_samples(); ++i) {
    const int32_t index = group->request.sample_index(i);
    auto sequence = std::make_unique<Sequence>();
    sequence->group = group;
    sequence->arrival = num_arrivals_++;
    sequence->sample_index = index;
    sequence->num_prompt = static_cast<int32_t>(prompt.size());
    sequence->end_position = static_cast<int32_t>(
        std::min<int64_t>(int64_t{sequence->num_prompt} + group->request.response_limit(index),
                          std::max<int64_t>(state_.limits.max_positions, sequence->num_prompt)));
    sequence->tokens = prompt;
    if (sequence->end_position == sequence->num_prompt) {
      emit(*sequence);  // no room for a token: an empty response that ended by length
    } else {
      state_.enqueue(std::move(sequence));
    }
  }
}

void Engine::add_score(ScoreRequest request) {
  auto sequence = std::make_unique<Sequence>();
  sequence->arrival = num_arrivals_++;
  const bridge::ScoreSequence& given = request.sequence;
  sequence->num_prompt = static_cast<int32_t>(given.input_ids.size());
  sequence->tokens = given.input_ids;
  sequence->tokens.insert(sequence->tokens.end(), given.response_ids.begin(),
                          given.response_ids.end());
  sequence->end_position = sequence->length();
  const bool is_empty = given.response_ids.empty();
  sequence->score = std::make_unique<ScoreRequest>(std::move(request));
  if (is_empty) {
    emit_scored(*sequence);
  } else {
    state_.enqueue(std::move(sequence));
  }
}

int64_t Engine::num_open() const {
  int64_t count = static_cast<int64_t>(state_.waiting.size());
  for (const auto& sequence : state_.running) count += !sequence->is_finished;
  return count;
}

int64_t Engine::abort(std::optional<int64_t> request_id) {
  int64_t num_aborted = 0;
  const auto end = [&](Sequence& sequence) {
    if (sequence.is_finished || sequence.is_score()) return false;
    if (request_id && sequence.group->request.key.request_id != *request_id) return false;
    sequence.finish_reason = bridge::FinishReason::kAbort;
    emit(sequence);
    ++num_aborted;
    return true;
  };
  for (auto next = state_.waiting.begin(); next != state_.waiting.end();) {
    Sequence& sequence = *(next++)->second;
    if (end(sequence)) state_.waiting.take(sequence);
  }
  for (const auto& sequence : state_.running) end(*sequence);
  policy_->retire(state_);
  return num_aborted;
}

bool Engine::has_started_work() const {
  return !state_.running.empty() || state_.waiting.num_started() > 0;
}

bool Engine::is_behind() const {
  return state_.waiting.num_started() > 0 ||
         std::ranges::any_of(state_.running, [](const auto& sequence) {
           return !sequence->is_finished && sequence->has_started() &&
                  sequence->num_remaining() > 1;
         });
}

Engine::StepOutcome Engine::step(std::chrono::milliseconds timeout,
                                 const std::function<bool()>& is_interrupted) {
  if (!is_awake()) return StepOutcome::kNothingToDo;
  fault_at(FaultPoint::kStepBegun);
  const auto started = Clock::now();
  backend_time_ = {};
  while (may_plan() && submit_next()) {
  }
  if (flights_.empty()) return StepOutcome::kNothingToDo;
  if (!finish_oldest(timeout, is_interrupted)) return StepOutcome::kInterrupted;
  const std::chrono::duration<double> all = Clock::now() - started;
  state_.counters.steps_s += all.count();
  state_.counters.scheduling_s += (all - backend_time_).count();
  return StepOutcome::kDone;
}

bool Engine::finish_steps(std::chrono::milliseconds timeout,
                          const std::function<bool()>& is_interrupted) {
  while (!flights_.empty()) {
    if (!finish_oldest(timeout, is_interrupted)) return false;
  }
  return true;
}

// How many tokens a step with drafts gives is known from its result alone.
bool Engine::may_plan() const {
  if (flights_.empty()) return true;
  return flights_.size() < max_steps_under_way_ && !flights_.back().batch.has_drafts &&
         policy_->can_plan_ahead(state_);
}

bool Engine::submit_next() {
  batch_.clear();
  policy_->plan(state_, batch_);
  if (batch_.empty()) return false;
  batch_.plan.wants_entropy = state_.limits.wants_entropy;
  ++state_.counters.num_steps;
  state_.counters.num_rows_computed += batch_.num_rows();
  for (const StepBatch::Entry& entry : batch_.entries) {
    state_.counters.num_pad_rows -= entry.num_tokens;
  }
  state_.counters.num_pad_rows += batch_.num_rows();
  const int64_t num_rows = batch_.num_rows();
  const auto submitted = Clock::now();
  const kernels::StepHandle handle = backend_.submit(std::move(batch_.plan));
  backend_time_ += Clock::now() - submitted;
  batch_.begin();
  flights_.push_back({.batch = std::exchange(batch_, {}),
                      .handle = handle,
                      .num_rows = num_rows,
                      .submitted = submitted});
  state_.num_steps_under_way = static_cast<int32_t>(flights_.size());
  return true;
}

bool Engine::finish_oldest(std::chrono::milliseconds timeout,
                           const std::function<bool()>& is_interrupted) {
  const auto asked = Clock::now();
  const std::optional<kernels::StepResult> result =
      wait(flights_.front().handle, timeout, is_interrupted);
  if (!result) {
    give_up_steps();
    return false;
  }
  fault_at(FaultPoint::kStepComputed);
  const auto ended = Clock::now();
  backend_time_ += ended - asked;
  Flight flight = std::move(flights_.front());
  flights_.pop_front();
  state_.num_steps_under_way = static_cast<int32_t>(flights_.size());
  // It began when the step before had ended, if that was later.
  const auto begun = std::max(flight.submitted, std::exchange(last_ended_, ended));
  work_.compute_s = std::chrono::duration<double>(ended - begun).count();
  work_.num_rows = flight.num_rows;
  apply(flight.batch, *result);
  batch_ = std::move(flight.batch);  // its memory serves the next step
  return true;
}

void Engine::give_up_steps() {
  for (Flight& flight : flights_) flight.batch.give_up();
  flights_.clear();
  state_.num_steps_under_way = 0;
}

void Engine::require_no_steps(const char* call) const {
  if (!flights_.empty()) fail_invariant(fmt::format("{} while a step is under way", call));
}

std::optional<kernels::StepResult> Engine::wait(kernels::StepHandle handle,
                                                std::chrono::milliseconds timeout,
                                                const std::function<bool()>& is_interrupted) {
  const auto deadline = Clock::now() + timeout;
  for (;;) {
    const auto now = Clock::now();
    try {
      return backend_.wait(handle, std::min(deadline, now + std::chrono::milliseconds(100)));
    } catch (const Error& error) {
      if (error.info.code != ErrorCode::kDeadlineExceeded || now >= deadline) throw;
    }
    if (is_interrupted()) return std::nullopt;
  }
}

void Engine::apply(StepBatch& batch, const kernels::StepResult& result) {
  state_.counters.num_rows_after_stop += batch.end();
  settle_drafts(state_, batch, result);
  // Before the policy sees them: nobody may share pages that hold NaN or infinity.
  for (const int32_t index : result.failed_sequences) {
    Sequence* sequence = batch.entries[static_cast<size_t>(index)].sequence;
    if (sequence != nullptr && !sequence->is_finished) {
      fail(*sequence, non_finite_error(*sequence, "keys and values"));
    }
  }
  policy_->after_step(state_, batch);
  for (size_t i = 0; i < result.samples.size(); ++i) {
    if (batch.sampled[i] == nullptr || result.samples[i].is_rejected) continue;
    Sequence& sequence = *batch.sampled[i];
    // A follower still without pages drew from a row of its leader that has failed: the draw is
    // void, and it will compute the prompt for itself.
    if (sequence.is_finished || sequence.pages.empty()) continue;
    if (!result.samples[i].is_finite) {
      fail(sequence, non_finite_error(sequence, "logits"));
      continue;
    }
    take_token(sequence, result.samples[i]);
  }
  for (const StepBatch::Entry& entry : batch.entries) {
    if (entry.sequence != nullptr && entry.sequence->is_score()) append_scores(entry, result);
  }
  if (observer_ != nullptr) tell_observer(batch);
  policy_->retire(state_);
}

void Engine::tell_observer(const StepBatch& batch) {
  work_.num_pages_used = state_.pool.num_pages() - state_.pool.num_available();
  describe_step(batch, work_);
  observer_->on_step(work_);
}

void Engine::take_token(Sequence& sequence, const kernels::HeadResult& result) {
  const int32_t index = sequence.num_known() - sequence.num_prompt;  // in the response
  if (sequence.weight_versions.empty() ||
      sequence.weight_versions.back().version != state_.weight_version) {
    sequence.weight_versions.push_back({index, state_.weight_version});
  }
  if (index == 0) state_.counters.num_prompt_tokens += sequence.num_prompt;
  if (sequence.num_pending > 0) {
    sequence.tokens[static_cast<size_t>(sequence.num_known())] = result.token;
    --sequence.num_pending;
  } else {  // an accepted draft's, or the first of a follower
    sequence.tokens.push_back(result.token);
  }
  sequence.logprobs.push_back(result.logprob);
  sequence.scaled_logprobs.push_back(result.scaled_logprob);
  sequence.support_logmass.push_back(result.support_logmass);
  if (state_.limits.wants_entropy) sequence.entropy.push_back(result.entropy);
  ++state_.counters.num_tokens_generated;
  if (result.finish == kernels::SlotFinish::kRunning) return;
  if (result.finish == kernels::SlotFinish::kStop) {
    sequence.finish_reason = bridge::FinishReason::kStop;
    sequence.stop_token_id = result.token;
  } else {
    sequence.finish_reason = bridge::FinishReason::kLength;
  }
  emit(sequence);
}

void Engine::append_scores(const StepBatch::Entry& entry, const kernels::StepResult& result) {
  Sequence& sequence = *entry.sequence;
  if (sequence.is_finished) return;
  for (int32_t i = entry.first_score; i < entry.first_score + entry.num_scores; ++i) {
    const kernels::HeadResult& score = result.scores[i];
    if (!score.is_finite) {
      fail(sequence, non_finite_error(sequence, "logits"));
      return;
    }
    sequence.logprobs.push_back(score.logprob);
    sequence.scaled_logprobs.push_back(score.scaled_logprob);
    sequence.entropy.push_back(score.entropy);
  }
  if (sequence.num_done() == sequence.known_end()) emit_scored(sequence);
}

void Engine::emit(Sequence& sequence) {
  sequence.is_finished = true;
  sequence.forget_steps_under_way();
  ++state_.counters.num_samples;
  const GroupRequest& request = sequence.group->request;
  output_.on_sample({.key = key_of(sequence),
                     .prompt_ids = request.prompt_ids,
                     .response_ids = std::vector<int32_t>(
                         sequence.tokens.begin() + sequence.num_prompt, sequence.tokens.end()),
                     .logprobs = std::move(sequence.logprobs),
                     .scaled_logprobs = std::move(sequence.scaled_logprobs),
                     .support_logmass = std::move(sequence.support_logmass),
                     .entropy = std::move(sequence.entropy),
                     .finish_reason = sequence.finish_reason,
                     .stop_token_id = sequence.stop_token_id,
                     .temperature = request.sampling.params.temperature,
                     .weight_versions = std::move(sequence.weight_versions)});
}

void Engine::emit_scored(Sequence& sequence) {
  sequence.is_finished = true;
  sequence.forget_steps_under_way();
  output_.on_scored(sequence.score->ticket, std::nullopt,
                    {.id = sequence.score->sequence.id,
                     .logprobs = std::move(sequence.logprobs),
                     .scaled_logprobs = std::move(sequence.scaled_logprobs),
                     .entropy = std::move(sequence.entropy)});
}

void Engine::fail(Sequence& sequence, ErrorInfo error) {
  sequence.is_finished = true;
  sequence.is_failed = true;
  sequence.forget_steps_under_way();
  if (sequence.is_score()) {
    output_.on_scored(sequence.score->ticket, std::move(error),
                      {.id = sequence.score->sequence.id});
  } else {
    output_.on_failed({.key = key_of(sequence), .error = std::move(error)});
  }
}

void Engine::set_policy(std::unique_ptr<BatchingPolicy> policy) {
  require_no_steps("set_policy");
  policy_->drop_kv(state_);
  state_.index.begin_version(state_.weight_version);
  policy_ = std::move(policy);
}

void Engine::switch_version(int64_t version) {
  require_no_steps("switch_version");
  policy_->drop_kv(state_);
  state_.index.begin_version(version);
  state_.weight_version = version;
  needs_weights_ = false;
}

void Engine::sleep(int level) {
  require_no_steps("sleep");
  policy_->drop_kv(state_);
  state_.index.begin_version(state_.weight_version);
  backend_.sleep(level);
  asleep_ = {.weights = true, .kv_cache = true};
  needs_weights_ |= level > 1;
}

void Engine::wake_up(kernels::MemoryTags tags) {
  backend_.wake_up(tags);
  asleep_.weights &= !tags.weights;
  asleep_.kv_cache &= !tags.kv_cache;
}

}  // namespace rollpack::rollout
