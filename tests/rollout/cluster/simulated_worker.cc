#include <sys/mman.h>
#include <unistd.h>

#include <utility>

#include "tests/rollout/cluster/simulated_bridge.h"
#include "tests/rollout/cluster/simulated_world.h"

namespace rollpack::rollout::simulation {
namespace {

// Samples a worker wants to have open.
constexpr int32_t kNumWanted = 6;
constexpr int64_t kWordIntervalMs = 300;  // of StepProgress, well within a lease

int64_t unpacked(int fd) {
  int64_t weights = -1;
  if (::pread(fd, &weights, sizeof(weights), 0) != sizeof(weights)) std::abort();
  return weights;
}

}  // namespace

bridge::OwnedFd packed_set(int64_t weights) {
  bridge::OwnedFd fd(::memfd_create("weights", MFD_CLOEXEC));
  if (::pwrite(fd.get(), &weights, sizeof(weights), 0) != sizeof(weights)) std::abort();
  return fd;
}

// Arrives after what was sent before it.
template <class T>
int64_t SimulatedWorker::arrival(const std::deque<OnWire<T>>& wire) {
  int64_t arrives_ms = world_.now_ms + world_.dice.below(5);
  if (world_.dice.chance(world_.fault_rate)) {
    arrives_ms += 400;
    world_.fault(Fault::kSlowLink);
  }
  return wire.empty() ? arrives_ms : std::max(arrives_ms, wire.back().arrives_ms);
}

void SimulatedWorker::start(int32_t index, bool is_replacement) {
  index_ = index;
  is_replacement_ = is_replacement;
  // Where ranks share, its weights are those that it adopts.
  emit(WorkerReady{.pid = 100 + index, .fingerprint = "same", .weights_hash = 0});
}

void SimulatedWorker::emit(Event event) {
  if (!is_alive_) return;
  const bool is_sample = std::holds_alternative<SampleDone>(event);
  if (is_sample && world_.dice.chance(world_.fault_rate)) {
    world_.fault(Fault::kDuplicate);
    outbox_.push_back({arrival(outbox_), event});
  }
  outbox_.push_back({arrival(outbox_), std::move(event)});
  const size_t size = outbox_.size();
  if (is_sample && size > 1 && std::holds_alternative<SampleDone>(outbox_[size - 2].message) &&
      world_.dice.chance(world_.fault_rate)) {
    world_.fault(Fault::kReorder);
    std::swap(outbox_[size - 1].message, outbox_[size - 2].message);
  }
}

void SimulatedWorker::deliver() {
  while (!outbox_.empty() && outbox_.front().arrives_ms <= world_.now_ms && !has_left_) {
    Event event = std::move(outbox_.front().message);
    outbox_.pop_front();
    dispatcher_.handle(index_, std::move(event));
  }
  if (is_alive_ || !outbox_.empty() || has_left_) return;
  has_left_ = true;
  dispatcher_.lose_worker(
      index_,
      {.code = ErrorCode::kUnavailable, .field = fmt::format("rank {}", index_), .value = "gone"});
}

void SimulatedWorker::turn() {
  deliver();
  if (!is_alive_) return;
  if (world_.now_ms < stopped_until_ms_) {
    const bool is_overdue = world_.now_ms - stopped_at_ms_ > kLeaseMs + 1000;
    world_.check(!is_overdue || !owed_at_stop_ || was_killed_,
                 fmt::format("worker {} was not given up {} ms after it was stopped", index_,
                             world_.now_ms - stopped_at_ms_));
    return;
  }
  while (!inbox_.empty() && inbox_.front().arrives_ms <= world_.now_ms && is_alive_) {
    Command command = std::move(inbox_.front().message);
    committed_version_ = inbox_.front().committed_version;
    inbox_.pop_front();
    if (is_stopped_) continue;
    std::visit([this](auto& known) { handle(known); }, command);
  }
  check_receipts();
  if (!is_stopped_) work();
  finish_waits();
}

void SimulatedWorker::work() {
  if (!rests()) {
    for (size_t i = 0; i < items_.size() && is_alive_;) {
      Item& item = items_[i];
      const bool admits = pending_pauses_.empty() && !pending_commit_ && !pending_sleep_;
      item.has_started |= admits;
      if (!item.has_started || --item.turns_left > 0) {
        ++i;
        continue;
      }
      if (is_process_ && world_.poison.contains(item.group.prompt_ids->front())) {
        world_.fault(Fault::kPoison);
        die(/*loses_tail=*/false);
        return;
      }
      const Item done = std::move(item);
      items_.erase(items_.begin() + static_cast<int64_t>(i));
      finish(done, /*is_aborted=*/false);
    }
    for (const ScoreRequest& request : std::exchange(scores_, {})) {
      emit(Scored{.ticket = request.ticket, .sequence = {.id = request.sequence.id}});
    }
  }
  const auto missing = kNumWanted - static_cast<int32_t>(items_.size()) - num_pulled_;
  if (missing > 0) {
    num_pulled_ += missing;
    emit(Pull{.num_samples = missing});
  }
  if (world_.now_ms < next_word_ms_ || items_.empty() || rests()) return;
  next_word_ms_ = world_.now_ms + kWordIntervalMs;
  emit(StepProgress{});
}

void SimulatedWorker::finish(const Item& item, bool is_aborted) {
  bridge::Sample sample{.key = item.group.key, .prompt_ids = item.group.prompt_ids};
  sample.key.sample_index = item.sample;
  sample.response_ids = expected_tokens(*item.group.prompt_ids, item.sample, weights_);
  auto length = static_cast<size_t>(item.group.response_limit(item.sample));
  if (is_aborted) {
    sample.finish_reason = bridge::FinishReason::kAbort;
    length = std::min(length, static_cast<size_t>(world_.dice.below(2)));
  } else {
    world_.check(version_ >= item.committed_version,
                 fmt::format("worker {} drew under version {} what it was given at version {}",
                             index_, version_, item.committed_version));
  }
  sample.response_ids.own().resize(std::min(sample.response_ids.size(), length));
  if (!sample.response_ids.empty()) sample.weight_versions = {{0, version_}};
  for (auto* column : {&sample.logprobs, &sample.scaled_logprobs, &sample.support_logmass}) {
    column->own().assign(sample.response_ids.size(), -1.0f);
  }
  hand_over({std::move(sample), item.group.attempt});
}

// Which way a sample goes, as SampleWay and StraightWay decide it.
void SimulatedWorker::hand_over(SampleDone done) {
  const int32_t node = done.sample.key.node;
  if (node == 0 || bridges_ == nullptr) return emit(std::move(done));
  SimulatedBridge& bridge = *bridges_->at(node);
  if (node == node_) {
    const SampleKept kept{done.sample.key, done.attempt, done.sample.finish_reason};
    bridge.put(index_, done.attempt, std::move(done.sample), {});
    return emit(kept);
  }
  if (node_ == 0 || world_.dice.chance(0.2))
    return emit(std::move(done));  // not known yet, or full
  if (links_.insert(node).second) bridge.begin(index_);
  const uint64_t number = ++num_sent_;
  world_.fault(Fault::kStraight);
  bridge.put(index_, done.attempt, done.sample, [self = weak_from_this(), node, number] {
    if (const auto worker = self.lock()) worker->receipts_.emplace_back(node, number);
  });
  under_way_[node].emplace(number, UnderWay{std::move(done), world_.now_ms});
}

void SimulatedWorker::take_receipt(int32_t node, uint64_t number) {
  const auto waiting = under_way_.find(node);
  if (waiting == under_way_.end()) return;
  const auto found = waiting->second.find(number);
  if (found == waiting->second.end()) return;
  const SampleDone& done = found->second.done;
  emit(SampleKept{done.sample.key, done.attempt, done.sample.finish_reason});
  waiting->second.erase(found);
  if (waiting->second.empty()) under_way_.erase(waiting);
}

// What has arrived is taken by a worker that runs. After half a lease, or with its link, all that
// waits goes through rank 0.
void SimulatedWorker::check_receipts() {
  for (const auto& [node, number] : std::exchange(receipts_, {})) take_receipt(node, number);
  for (auto it = under_way_.begin(); it != under_way_.end();) {
    const auto& [node, waiting] = *it;
    const bool is_late = world_.now_ms - waiting.begin()->second.sent_ms > kLeaseMs / 2;
    const bool breaks = world_.dice.chance(world_.fault_rate);
    if (!is_late && !breaks) {
      ++it;
      continue;
    }
    world_.fault(Fault::kWithdrawal);
    links_.erase(node);
    bridges_->at(node)->end(index_, /*loses_tail=*/breaks);
    for (const auto& [number, each] : waiting) {
      emit(each.done);
      emit(SampleWithdrawn{each.done.sample.key, each.done.attempt});
    }
    it = under_way_.erase(it);
  }
}

// Its process is gone.
void SimulatedWorker::leave_bridges(bool loses_tail) {
  for (const int32_t node : std::exchange(links_, {})) {
    bridges_->at(node)->end(index_, loses_tail);
  }
  under_way_.clear();
  if (held_ != nullptr) held_->die();
}

void SimulatedWorker::hand_back(std::optional<int64_t> request_id) {
  std::vector<Item> kept;
  for (Item& item : items_) {
    if (request_id && item.group.key.request_id != *request_id) {
      kept.push_back(std::move(item));
    } else {
      finish(item, /*is_aborted=*/true);
    }
  }
  items_ = std::move(kept);
}

void SimulatedWorker::stop_for(int64_t ms) {
  if (world_.now_ms < stopped_until_ms_) return;
  is_at_fault_ = true;
  stopped_at_ms_ = world_.now_ms;
  stopped_until_ms_ = world_.now_ms + ms;
  owed_at_stop_ = (!items_.empty() && !rests() && !is_stopped_) || held_ != nullptr;
}

void SimulatedWorker::kill() {
  was_killed_ = true;
  if (held_ != nullptr) held_->die();
  if (!is_alive_) return;
  // Who joins is given up when it cannot catch up; of the last update the client does not know yet.
  const bool cannot_catch_up =
      is_replacement_ && world_.num_partial_updates >= KeptWeights::kMaxPartialUpdates;
  world_.check(is_at_fault_ || cannot_catch_up,
               fmt::format("worker {} was given up, and had done nothing", index_));
  if (world_.dice.chance(0.3) && !world_.has_calmed_down) {
    world_.fault(Fault::kZombie);
    return;
  }
  die(/*loses_tail=*/false);
}

void SimulatedWorker::die(bool loses_tail) {
  is_alive_ = false;
  leave_bridges(loses_tail);
  if (!loses_tail || outbox_.empty()) return;
  world_.fault(Fault::kLostTail);
  outbox_.resize(static_cast<size_t>(world_.dice.below(static_cast<int64_t>(outbox_.size()))));
}

void SimulatedWorker::fail() {
  if (is_stopped_) return;
  world_.fault(Fault::kEngineFailure);
  is_at_fault_ = true;
  is_stopped_ = true;
  items_.clear();
  scores_.clear();
  emit(WorkerFailed{{.code = ErrorCode::kInternal, .message = "a bug"}});
}

// ---- commands
// ------------------------------------------------------------------------------------

void SimulatedWorker::handle(AddGroups& command) {
  for (const GroupRequest& group : command.groups) {
    num_pulled_ -= group.num_samples();
    for (int32_t i = 0; i < group.num_samples(); ++i) {
      items_.push_back({.group = group,
                        .sample = group.sample_index(i),
                        .committed_version = committed_version_,
                        .turns_left = world_.dice.between(1, 12)});
    }
  }
}

void SimulatedWorker::handle(AddScores& command) {
  for (ScoreRequest& request : command.requests) scores_.push_back(std::move(request));
}

void SimulatedWorker::answer(uint64_t ticket, bridge::Outcome error) {
  emit(Ack{.ticket = ticket, .error = std::move(error)});
}

void SimulatedWorker::answer_with_hash(uint64_t ticket, int64_t weights) {
  emit(Ack{.ticket = ticket,
           .weights_hash = static_cast<uint64_t>(weights),
           .times = {.packing_ms = 1, .pause_ms = 2}});
}

void SimulatedWorker::handle(Pause& command) {
  if (command.in_flight == bridge::InFlight::kWait) {
    pending_pauses_.push_back(command.ticket);
    return;
  }
  if (command.in_flight == bridge::InFlight::kAbort) hand_back(std::nullopt);
  is_paused_ = true;
  answer(command.ticket);
}

void SimulatedWorker::handle(Resume&) {
  is_paused_ = false;
  for (const uint64_t ticket : std::exchange(pending_pauses_, {})) answer(ticket);
}

void SimulatedWorker::handle(Sleep& command) {
  if (command.in_flight == bridge::InFlight::kAbort) hand_back(std::nullopt);
  if (command.in_flight == bridge::InFlight::kKeep) return fall_asleep(command);
  pending_sleep_ = command;
}

void SimulatedWorker::fall_asleep(const Sleep& command) {
  world_.check(!staged_.has_value(), "a worker was put to sleep with weights staged");
  asleep_ = {.weights = true, .kv_cache = true};
  if (command.level > 1) has_weights_ = false;  // what is aborted was drawn before
  emit(Ack{.ticket = command.ticket, .held_bytes = 1});
}

void SimulatedWorker::handle(WakeUp& command) {
  asleep_.weights &= !command.tags.weights;
  asleep_.kv_cache &= !command.tags.kv_cache;
  emit(Ack{.ticket = command.ticket, .held_bytes = 2});
}

void SimulatedWorker::handle(BeginWeights& command) {
  world_.check(!asleep_.weights, "a worker whose weights sleep is to stage others");
  world_.check(has_weights_ || !command.is_partial, "a part of weights that were dropped comes");
  staged_ = command.is_partial ? weights_ : 0;
  answer(command.ticket);
}

void SimulatedWorker::handle(StageWeights& command) {
  if (world_.dice.chance(world_.fault_rate)) {
    world_.fault(Fault::kStaging);
    is_at_fault_ = true;
    return answer(command.ticket, ErrorInfo{.code = ErrorCode::kResourceExhausted});
  }
  if (staged_) *staged_ += command.chunk->tensors[0].shape[0];
  answer(command.ticket);
}

void SimulatedWorker::handle(FinishWeights& command) {
  if (!command.exports) return answer_with_hash(command.ticket, staged_.value_or(-1));
  if (!staged_) return answer(command.ticket, ErrorInfo{.code = ErrorCode::kFailedPrecondition});
  // The dispatcher duplicates the descriptor while it handles the event, which is now: the one
  // exporting worker has no wire.
  const bridge::OwnedFd fd = packed_set(*staged_);
  while (!outbox_.empty()) {
    dispatcher_.handle(index_, std::move(outbox_.front().message));
    outbox_.pop_front();
  }
  dispatcher_.handle(index_, Ack{.ticket = command.ticket,
                                 .weights_hash = static_cast<uint64_t>(*staged_),
                                 .fd = fd.get()});
}

void SimulatedWorker::handle(AdoptWeights& command) {
  staged_ = unpacked(command.fd->get());
  answer_with_hash(command.ticket, *staged_);
}

void SimulatedWorker::handle(CommitWeights& command) {
  if (command.version > 0 && world_.dice.chance(world_.fault_rate)) {
    world_.fault(Fault::kSwitch);
    is_at_fault_ = true;
    return answer(command.ticket, ErrorInfo{.code = ErrorCode::kInternal, .message = "no switch"});
  }
  if (command.in_flight == bridge::InFlight::kWait && !items_.empty() && !rests()) {
    pending_commit_ = command;
    return;
  }
  if (command.in_flight == bridge::InFlight::kAbort) hand_back(std::nullopt);
  switch_to(command);
}

void SimulatedWorker::switch_to(const CommitWeights& commit) {
  world_.check(staged_.has_value(), "a worker was told to switch to what it had not staged");
  weights_ = staged_.value_or(-1);
  staged_.reset();
  version_ = commit.version;
  has_weights_ = true;
  if (is_process_ && version_ > 0 && world_.dice.chance(world_.fault_rate)) {
    world_.fault(Fault::kWrongWeights);
    is_at_fault_ = true;
    weights_ += 5000;
  }
  answer_with_hash(commit.ticket, weights_);
}

void SimulatedWorker::finish_waits() {
  const bool has_started = !rests() && std::ranges::any_of(items_, &Item::has_started);
  if (!is_alive_ || is_stopped_ || has_started) return;
  if (pending_commit_) switch_to(*std::exchange(pending_commit_, std::nullopt));
  if (pending_sleep_) fall_asleep(*std::exchange(pending_sleep_, std::nullopt));
  if (pending_pauses_.empty()) return;
  is_paused_ = true;
  for (const uint64_t ticket : std::exchange(pending_pauses_, {})) answer(ticket);
}

void SimulatedWorker::handle(Stop& command) {
  if (command.hand_back) hand_back(std::nullopt);
  is_stopped_ = true;
  emit(WorkerStopped{});
}

}  // namespace rollpack::rollout::simulation
