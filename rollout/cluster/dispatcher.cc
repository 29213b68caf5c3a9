#include "rollout/cluster/dispatcher.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "kernels/base/error.h"
#include "rollout/engine/engine.h"

namespace rollpack::rollout {
namespace {

// Samples accepted and not finished: 64k of 2k tokens each hold about 2 GiB when all are done at
// once.
constexpr int64_t kMaxOpenSamples = 65536;
// A frame has at most 16 MiB: a message is full after 4 MiB of groups.
constexpr size_t kMaxGroupBytes = size_t{4} << 20;

bridge::PromptId id_of(const bridge::PromptRequest& prompt, size_t index) {
  if (prompt.prompt_id) return *prompt.prompt_id;
  return {.text = std::to_string(index), .is_integer = true};
}

// Its lists, and about what its keys and numbers take.
size_t bytes_in_message(const GroupRequest& group) {
  return 4 * (group.prompt_ids->size() + group.response_lengths.size() +
              group.sampling.stop_token_ids.size()) +
         group.key.prompt_id.text.size() + 512;
}

std::string origin_of(const bridge::PromptRequest& prompt, size_t index) {
  return prompt.origin.empty() ? fmt::format("prompts[{}]", index) : prompt.origin;
}

}  // namespace

Dispatcher::Dispatcher(const Config& config, const ModelConfig& model, const EngineLimits& limits,
                       std::string fingerprint, uint64_t weights_hash, bool shares_weights,
                       RecoveryOptions recovery)
    : config_(config),
      model_(model),
      limits_(limits),
      fingerprint_(std::move(fingerprint)),
      shares_weights_(shares_weights),
      recovery_(std::move(recovery)),
      has_other_bridges_(config.bridge.endpoints == "per_node"),
      weights_{.hash = weights_hash} {
  ledger_.set_longest_first(wants_longest_first(config.engine.batching));
}

bridge::ServiceInfo Dispatcher::info() const {
  return {.resolved_config_json = config_json(config_),
          .eos_token_ids = model_.eos_token_ids,
          .pad_token_id = model_.written_pad_id(),
          .vocab_size = model_.vocab_size,
          .fingerprint = fingerprint_,
          .attention_parity_tokens = model_.attention_parity_tokens()};
}

void Dispatcher::run(Effects& effects) {
  for (const auto& effect : effects) effect();
}

// ---- requests
// ------------------------------------------------------------------------------------

int64_t Dispatcher::submit(std::vector<bridge::PromptRequest> prompts, int32_t node,
                           const std::function<void(int64_t request_id)>& accepted) {
  Effects effects;
  int64_t request_id = 0;
  {
    const std::lock_guard lock(mutex_);
    check_health();
    check_weights();
    check_new_ids(prompts);
    request_id = num_requests_;
    // All prompts are checked before the first is accepted: a submit is taken whole or not at all.
    std::vector<GroupRequest> groups;
    std::vector<bridge::Outcome> skipped(prompts.size());
    std::vector<std::string> origins;
    int64_t num_samples = 0;
    for (size_t i = 0; i < prompts.size(); ++i) {
      origins.push_back(prompts[i].prompt_id ? origin_of(prompts[i], i) : "");
      groups.push_back(
          make_group(std::move(prompts[i]), static_cast<int32_t>(i), request_id, skipped[i]));
      groups.back().key.node = node;
      num_samples += groups.back().key.group_size;
    }
    check_room(num_samples);
    ++num_requests_;
    if (log_ != nullptr) {
      std::vector<AcceptedGroup> written;
      written.reserve(groups.size());
      for (size_t i = 0; i < groups.size(); ++i) {
        written.push_back({groups[i], origins[i], skipped[i]});
      }
      log_->accepted(request_id, std::move(written));
    }
    if (accepted) accepted(request_id);
    for (size_t i = 0; i < groups.size(); ++i) {
      if (!skipped[i]) {
        ledger_.accept(std::move(groups[i]), std::move(origins[i]));
      } else {
        fail_open(groups[i], *skipped[i], effects);
      }
    }
    spdlog::debug("request {}: {} prompts, {} samples", request_id, prompts.size(), num_samples);
    dispatch();
  }
  run(effects);
  return request_id;
}

int64_t Dispatcher::submit_groups(std::vector<GroupRequest> groups) {
  const std::lock_guard lock(mutex_);
  check_health();
  check_weights();
  const int64_t request_id = num_requests_++;
  for (size_t i = 0; i < groups.size(); ++i) {
    groups[i].key.request_id = request_id;
    groups[i].key.prompt_index = static_cast<int32_t>(i);
    if (auto error = check_group(groups[i], limits_, groups[i].key.prompt_id.text)) {
      throw Error(*error);
    }
  }
  for (GroupRequest& group : groups) ledger_.accept(std::move(group), "");
  dispatch();
  return request_id;
}

void Dispatcher::check_health() const {
  if (fatal_) throw Error(*fatal_);
  if (is_ending_) {
    throw Error({.code = ErrorCode::kUnavailable, .message = "the service is shutting down"});
  }
}

void Dispatcher::check_weights() const {
  if (!needs_weights_) return;
  throw Error({.code = ErrorCode::kFailedPrecondition,
               .field = "weights",
               .value = "dropped by sleep(level=2)",
               .allowed = "a whole update_weights() first",
               .message = asleep_.weights ? "wake_up(tags=[\"weights\"]), then send all tensors"
                                          : "send all tensors"});
}

void Dispatcher::check_room(int64_t num_samples) const {
  if (ledger_.num_open_samples() + num_samples <= kMaxOpenSamples) return;
  throw Error(
      {.code = num_samples > kMaxOpenSamples ? ErrorCode::kInvalidArgument : ErrorCode::kWouldBlock,
       .field = "prompts",
       .value =
           fmt::format("{} samples beside {} open ones", num_samples, ledger_.num_open_samples()),
       .allowed = fmt::format("{} open samples in all", kMaxOpenSamples),
       .message =
           num_samples > kMaxOpenSamples ? "split the submit" : "take batches, then submit again"});
}

void Dispatcher::check_new_ids(const std::vector<bridge::PromptRequest>& prompts) const {
  std::unordered_map<std::string, size_t> seen;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const bridge::PromptId id = id_of(prompts[i], i);
    const auto [earlier, is_new] = seen.emplace(id.text, i);
    std::string other;
    if (!is_new) {
      other = origin_of(prompts[earlier->second], earlier->second);
    } else if (prompts[i].prompt_id) {
      // Ids by default may repeat between submits: nobody chose them.
      other = ledger_.live_origin(id.text).value_or("");
      if (!other.empty()) other += " of a live request";
    }
    if (other.empty()) continue;
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "prompt_id",
                 .value = id.text,
                 .origin = origin_of(prompts[i], i),
                 .allowed = "an id that no other live prompt has",
                 .message = fmt::format("{} has it too", other)});
  }
}

GroupRequest Dispatcher::make_group(bridge::PromptRequest prompt, int32_t index, int64_t request_id,
                                    bridge::Outcome& skipped) const {
  const std::string origin = origin_of(prompt, index);
  const auto invalid = [&](std::string field, std::string value, std::string allowed,
                           std::string message = "") {
    return ErrorInfo{.code = ErrorCode::kInvalidArgument,
                     .field = std::move(field),
                     .value = std::move(value),
                     .origin = origin,
                     .allowed = std::move(allowed),
                     .message = std::move(message)};
  };
  const int32_t n = prompt.n.value_or(config_.rollout.n);
  if (n < 1 || n > kMaxGroupSize) {
    throw Error(invalid("n", std::to_string(n), fmt::format("1 to {}", kMaxGroupSize)));
  }
  if (prompt.input_ids.empty()) throw Error(invalid("input_ids", "[]", "at least one token"));
  for (size_t i = 0; i < prompt.input_ids.size(); ++i) {
    const int32_t id = prompt.input_ids[i];
    if (id >= 0 && id < model_.vocab_size) continue;
    throw Error(invalid(fmt::format("input_ids[{}]", i), std::to_string(id),
                        fmt::format("token ids from 0 to {}", model_.vocab_size - 1)));
  }
  const auto limit = static_cast<size_t>(config_.rollout.prompt_length);
  if (prompt.input_ids.size() > limit) {
    const ErrorInfo error = invalid(
        "input_ids", fmt::format("{} tokens", prompt.input_ids.size()),
        fmt::format("at most rollout.prompt_length = {} tokens", limit),
        "raise rollout.prompt_length, or set rollout.prompt_overflow to skip or truncate_left");
    if (config_.rollout.prompt_overflow == "error") throw Error(error);
    if (config_.rollout.prompt_overflow == "skip") skipped = error;
    if (config_.rollout.prompt_overflow == "truncate_left") {
      prompt.input_ids.erase(prompt.input_ids.begin(), prompt.input_ids.end() - limit);
    }
  }
  GroupRequest group;
  group.key = {.request_id = request_id,
               .prompt_index = index,
               .prompt_id = id_of(prompt, index),
               .group_size = n};
  group.sampling = resolve_sampling(config_.rollout, prompt.sampling, model_.eos_token_ids,
                                    model_.vocab_size, origin);
  group.prompt_ids = std::make_shared<const std::vector<int32_t>>(std::move(prompt.input_ids));
  if (!skipped) {
    if (auto error = check_group(group, limits_, origin)) throw Error(*error);
  }
  return group;
}

int64_t Dispatcher::end_samples(std::optional<int64_t> request_id, bool writes_down) {
  Effects effects;
  int64_t num_open = 0;
  {
    const std::lock_guard lock(mutex_);
    if (log_ != nullptr && writes_down) log_->aborted(request_id);
    num_open = request_id ? ledger_.num_open_samples(*request_id) : ledger_.num_open_samples();
    for (const GroupRequest& request : ledger_.abort(request_id)) commit_empty(request, effects);
    for (const int32_t worker : all_workers()) {
      workers_[worker].link->send(AbortSamples{request_id});
    }
  }
  run(effects);
  return num_open;
}

int64_t Dispatcher::end_samples_of(int32_t node, bool writes_down) {
  std::vector<int64_t> requests;
  {
    const std::lock_guard lock(mutex_);
    requests = ledger_.open_requests(node);
  }
  int64_t num_open = 0;
  for (const int64_t request_id : requests) num_open += end_samples(request_id, writes_down);
  return num_open;
}

void Dispatcher::score(std::vector<bridge::ScoreSequence> sequences,
                       bridge::Answer<std::vector<bridge::ScoredSequence>> done) {
  bridge::Outcome error;
  {
    const std::lock_guard lock(mutex_);
    error = fatal_;
    if (!error && all_workers().empty()) {
      error =
          ErrorInfo{.code = ErrorCode::kUnavailable, .message = "no worker takes part at present"};
    }
    if (!error && !is_awake()) {
      error = ErrorInfo{
          .code = ErrorCode::kFailedPrecondition,
          .field = "score",
          .value = asleep_.any() ? "while asleep" : "without weights",
          .allowed = asleep_.any() ? "wake_up() first" : "a whole update_weights() first"};
    }
    for (const bridge::ScoreSequence& sequence : sequences) {
      if (!error) error = check_score(sequence, limits_, model_.vocab_size);
    }
    if (!error && !sequences.empty()) {
      auto batch = std::make_shared<ScoreBatch>();
      batch->results.resize(sequences.size());
      batch->num_deaths.resize(sequences.size());
      batch->num_missing = sequences.size();
      batch->sequences = std::move(sequences);
      batch->done = std::move(done);
      for (size_t i = 0; i < batch->sequences.size(); ++i) send_score(batch, i);
      return;
    }
  }
  done(std::move(error), {});
}

void Dispatcher::send_score(const std::shared_ptr<ScoreBatch>& batch, size_t index) {
  const std::vector<int32_t> live = all_workers();
  const int32_t worker = live[index % live.size()];
  expect_progress(worker);
  const uint64_t ticket = ++num_tickets_;
  workers_[worker].score_tickets.insert(ticket);
  scores_[ticket] = {batch, index};
  AddScores command;
  command.requests.push_back({.ticket = ticket, .sequence = batch->sequences[index]});
  workers_[worker].link->send(std::move(command));
}

void Dispatcher::pause(bridge::InFlight in_flight, bridge::OutcomeCallback done) {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    is_paused_ = true;
    broadcast(
        all_workers(),
        [&](uint64_t ticket) {
          return Pause{ticket, in_flight};
        },
        [done = std::move(done)](bridge::Outcome error, int) { done(std::move(error)); }, effects)
        ->pauses = true;
  }
  run(effects);
}

void Dispatcher::resume() {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    is_paused_ = false;
    if (awaited_version_) {
      awaited_version_.reset();
      log_switch(is_switching_ ? *update_version_ : weights_.version);
      tell_change(effects);
      dispatch();
    }
    for (const auto& [ticket, collection] : collections_) collection->pauses = false;
    for (const int32_t worker : all_workers()) {
      WorkerState& state = workers_[worker];
      // Who stood still without being told to gets no new lease.
      if (std::exchange(state.is_paused, false)) state.last_progress = recovery_.now();
      state.link->send(Resume{});
    }
  }
  run(effects);
}

// Gives queued groups to workers that asked, each to the one with the least work at hand. A worker
// gets its share in one message, so that what was submitted at once can start at once.
void Dispatcher::dispatch() {
  std::map<int32_t, AddGroups> shares;
  std::map<int32_t, size_t> num_bytes;
  if (awaited_version_ || !is_awake()) return;
  dispatch_suspect();
  while (!askers_.empty()) {
    const int32_t index = askers_.begin()->second;
    const std::optional<Ledger::GroupKey> key = ledger_.next(workers_[index].link->node());
    if (!key) break;
    GroupRequest group = take_group(*key, index);
    AddGroups& share = shares[index];
    num_bytes[index] += bytes_in_message(group);
    share.groups.push_back(std::move(group));
    if (num_bytes[index] < kMaxGroupBytes) continue;
    workers_[index].link->send(std::exchange(share, {}));
    num_bytes[index] = 0;
  }
  for (auto& [index, share] : shares) {
    if (!share.groups.empty()) workers_[index].link->send(std::move(share));
  }
}

bool Dispatcher::asks(int32_t worker) const {
  const WorkerState& state = workers_[worker];
  return state.takes_part() && state.num_wanted > 0 && !state.is_doubted && quarantine_ != worker;
}

GroupRequest Dispatcher::take_group(const Ledger::GroupKey& key, int32_t worker) {
  WorkerState& state = workers_[worker];
  expect_progress(worker);
  askers_.erase({state.num_outstanding, worker});
  state.num_outstanding += ledger_.expected_tokens(key);
  GroupRequest group = ledger_.assign(key, worker);
  state.num_wanted -= group.num_samples();
  if (asks(worker)) askers_.emplace(state.num_outstanding, worker);
  return group;
}

}  // namespace rollpack::rollout
