#include "rollout/node_bridge/node_service.h"

#include <fmt/format.h>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

// Requests of one kind that rank 0 has not answered: a client sends a few at once, and a node has
// tens of clients.
constexpr size_t kMaxWaiting = 8192;

}  // namespace

template <class Value>
uint64_t NodeService::Waiting<Value>::add(bridge::Answer<Value> done) {
  const std::lock_guard lock(mutex_);
  if (waiting_.size() >= kMaxWaiting) {
    throw Error({.code = ErrorCode::kWouldBlock,
                 .field = "requests that rank 0 has not answered",
                 .value = std::to_string(waiting_.size()),
                 .allowed = fmt::format("fewer than {}", kMaxWaiting)});
  }
  waiting_.emplace(++last_, std::move(done));
  return last_;
}

template <class Value>
void NodeService::Waiting<Value>::answer(uint64_t ticket, bridge::Outcome error, Value value) {
  bridge::Answer<Value> done;
  {
    const std::lock_guard lock(mutex_);
    auto found = waiting_.extract(ticket);
    if (!found) return;
    done = std::move(found.mapped());
  }
  done(std::move(error), std::move(value));
}

template <class Value>
void NodeService::Waiting<Value>::fail_all(const ErrorInfo& error) {
  std::map<uint64_t, bridge::Answer<Value>> all;
  {
    const std::lock_guard lock(mutex_);
    all.swap(waiting_);
  }
  for (const auto& [ticket, done] : all) done(error, {});
}

void NodeService::open(told::Open news) {
  const std::lock_guard lock(mutex_);
  info_ = std::move(news.info);
  state_ = std::move(news.state);
}

void NodeService::update(told::State news) {
  const std::lock_guard lock(mutex_);
  state_ = std::move(news);
}

void NodeService::answer(const told::Number& news) {
  numbers_.answer(news.ticket, news.error, news.value);
}

void NodeService::answer(told::Scores news) {
  scores_.answer(news.ticket, std::move(news.error), std::move(news.results));
}

void NodeService::answer(const told::Slept& news) {
  sleeps_.answer(news.ticket, news.error, news.state);
}

void NodeService::answer(const told::Weights& news) {
  weights_.answer(news.ticket, std::nullopt, news.weights);
}

void NodeService::answer(told::Stats news) {
  stats_.answer(news.ticket, std::nullopt, std::move(news.values));
}

void NodeService::lose(const ErrorInfo& error) {
  {
    const std::lock_guard lock(mutex_);
    lost_ = error;
  }
  numbers_.fail_all(error);
  scores_.fail_all(error);
  sleeps_.fail_all(error);
  weights_.fail_all(error);
  stats_.fail_all(error);
}

void NodeService::check_health() const {
  if (const bridge::Outcome broken = health()) throw Error(*broken);
}

bridge::ServiceInfo NodeService::info() const {
  const std::lock_guard lock(mutex_);
  return info_;
}

void NodeService::submit(std::vector<bridge::PromptRequest> prompts, bridge::Answer<int64_t> done) {
  check_health();
  send_(asked::Submit{numbers_.add(std::move(done)), std::move(prompts)});
}

void NodeService::abort(std::optional<int64_t> request_id, bridge::Answer<int64_t> done) {
  check_health();
  send_(asked::Abort{numbers_.add(std::move(done)), request_id});
}

void NodeService::pause(bridge::InFlight in_flight, bridge::OutcomeCallback done) {
  check_health();
  const auto ticket = numbers_.add(
      [done = std::move(done)](bridge::Outcome outcome, int64_t) { done(std::move(outcome)); });
  send_(asked::Pause{ticket, in_flight});
}

void NodeService::resume() {
  check_health();
  send_(asked::Resume{});
}

void NodeService::sleep(int level, bridge::InFlight in_flight,
                        bridge::Answer<bridge::SleepState> done) {
  check_health();
  send_(asked::Sleep{sleeps_.add(std::move(done)), level, in_flight});
}

void NodeService::wake_up(bridge::MemoryTags tags, bridge::Answer<bridge::SleepState> done) {
  check_health();
  send_(asked::WakeUp{sleeps_.add(std::move(done)), tags});
}

bridge::SleepState NodeService::sleep_state() const {
  const std::lock_guard lock(mutex_);
  return state_.sleep;
}

void NodeService::score(std::vector<bridge::ScoreSequence> sequences,
                        bridge::Answer<std::vector<bridge::ScoredSequence>> done) {
  check_health();
  send_(asked::Score{scores_.add(std::move(done)), std::move(sequences)});
}

void NodeService::begin_weights(bridge::WeightUpdate, bridge::OutcomeCallback done) {
  done(no_weights_here());
}

void NodeService::stage_weights(bridge::WeightChunk, bridge::OutcomeCallback done) {
  done(no_weights_here());
}

void NodeService::commit_weights(bridge::InFlight, bridge::OutcomeCallback done) {
  done(no_weights_here());
}

ErrorInfo NodeService::no_weights_here() const {
  return {.code = ErrorCode::kFailedPrecondition,
          .field = "update_weights",
          .value = "at the bridge of another node",
          .origin = "bridge.endpoints = per_node",
          .allowed = "at " + weights_place_,
          .message = "one trainer sends the weights there, for all nodes"};
}

int64_t NodeService::weight_version() const {
  const std::lock_guard lock(mutex_);
  return state_.weight_version;
}

void NodeService::find_weights(bridge::Answer<bridge::WeightsInUse> done) {
  check_health();
  send_(asked::FindWeights{weights_.add(std::move(done))});
}

std::optional<int64_t> NodeService::awaited_weight_version() const {
  const std::lock_guard lock(mutex_);
  return state_.awaited_weight_version;
}

void NodeService::find_stats(bridge::Answer<Numbers> done) {
  check_health();
  send_(asked::FindStats{stats_.add(std::move(done))});
}

void NodeService::when_durable(std::function<void(std::optional<ErrorInfo>)> done) {
  if (const bridge::Outcome broken = health()) return done(broken);
  try {
    const auto ticket = numbers_.add([done](bridge::Outcome outcome, int64_t) { done(outcome); });
    send_(asked::WhenDurable{ticket});
  } catch (const Error& error) {
    done(error.info);
  }
}

bridge::Outcome NodeService::health() const {
  const std::lock_guard lock(mutex_);
  return lost_ ? lost_ : state_.health;
}

}  // namespace rollpack::rollout
