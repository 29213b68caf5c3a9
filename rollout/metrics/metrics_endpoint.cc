#include "rollout/metrics/metrics_endpoint.h"

#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "rollout/metrics/bounded_thread.h"
#include "rollout/metrics/http_server.h"
#include "rollout/metrics/metric_table.h"
#include "rollout/metrics/throughput.h"

namespace rollpack::rollout {
namespace {

using Clock = std::chrono::steady_clock;

// Ranks say theirs once a second.
constexpr std::chrono::milliseconds kPeriod{500};
constexpr std::chrono::milliseconds kAnswerTime{50};
constexpr std::chrono::milliseconds kFirstSnapshotTime{200};
constexpr std::chrono::milliseconds kSamplerStopTimeout{300};

double share(const std::map<std::string, double>& values, const char* part, const char* whole) {
  const auto of = values.find(whole);
  const auto used = values.find(part);
  if (of == values.end() || used == values.end() || of->second <= 0) return 0;
  return used->second / of->second;
}

}  // namespace

struct MetricsEndpoint::State {
  State(const Config& config, const Dispatcher& given_dispatcher, bridge::Server& given_server)
      : dispatcher(given_dispatcher),
        server(given_server),
        labels{.model_name = config.model.path,
               .dtype = config.model.dtype,
               .batching = config.engine.batching},
        limits{.lease = std::chrono::duration<double>(config.cluster.lease_s)} {}

  // The sampling thread.
  void sample_until_stopped(const std::shared_ptr<State>& self);
  void ask_bridge(const std::shared_ptr<State>& self);
  Snapshot take() const;
  void derive(Snapshot& snapshot);

  // The HTTP thread.
  HttpReply answer(std::string_view path);
  const std::string& text_of(const std::shared_ptr<const Snapshot>& snapshot, const Health& health);

  const Dispatcher& dispatcher;
  bridge::Server& server;
  const JobLabels labels;
  const HealthLimits limits;

  mutable std::mutex mutex;  // of the next six
  std::condition_variable changed;
  ServingPhase phase = ServingPhase::kStarting;
  bool is_stopped = false;
  std::shared_ptr<const Snapshot> snapshot;
  std::optional<bridge::ServerNumbers> bridge_numbers;
  std::optional<Clock::time_point> bridge_asked;  // and has not answered yet

  Throughput prompt_tokens, generation_tokens;  // the sampling thread's

  std::shared_ptr<const Snapshot> written;  // the HTTP thread's: what `text` is about
  Health written_health;
  std::string text;
};

void MetricsEndpoint::State::sample_until_stopped(const std::shared_ptr<State>& self) {
  for (;;) {
    ask_bridge(self);
    auto next = std::make_shared<Snapshot>(take());
    derive(*next);
    const ServingPhase seen = next->phase;
    std::unique_lock lock(mutex);
    snapshot = std::move(next);
    changed.notify_all();
    changed.wait_for(lock, kPeriod, [&] { return is_stopped || phase != seen; });
    if (is_stopped) return;
  }
}

// One question at a time: a bridge that does not answer is not asked again. Most often it answers
// at once.
void MetricsEndpoint::State::ask_bridge(const std::shared_ptr<State>& self) {
  {
    const std::lock_guard lock(mutex);
    if (phase == ServingPhase::kStarting || bridge_asked || is_stopped) return;
    bridge_asked = Clock::now();
  }
  server.ask_numbers([self](bridge::ServerNumbers numbers) {
    {
      const std::lock_guard lock(self->mutex);
      self->bridge_numbers = std::move(numbers);
      self->bridge_asked.reset();
    }
    self->changed.notify_all();
  });
  std::unique_lock lock(mutex);
  changed.wait_for(lock, kAnswerTime, [this] { return !bridge_asked || is_stopped; });
}

Snapshot MetricsEndpoint::State::take() const {
  Snapshot taken;
  {
    const std::lock_guard lock(mutex);
    taken.phase = phase;  // of before: what follows is at least as new
  }
  for (auto& [name, value] : dispatcher.stats()) taken.values[name] = value;
  taken.workers = dispatcher.worker_numbers();
  taken.broken = dispatcher.health();
  taken.time = Clock::now();
  const std::lock_guard lock(mutex);
  taken.bridge_asked = bridge_asked;
  if (!bridge_numbers) return taken;
  for (const auto& [name, value] : bridge_numbers->values) taken.values[name] = value;
  taken.batch_waits = bridge_numbers->batch_waits;
  if (!taken.broken) taken.broken = bridge_numbers->fault;
  return taken;
}

void MetricsEndpoint::State::derive(Snapshot& of) {
  std::map<std::string, double>& values = of.values;
  values["num_waiting"] = values["num_waiting_seqs"] + values["num_queued_samples"];
  values["kv_cache_usage"] = share(values, "num_kv_pages_used", "num_kv_pages");
  values["slot_usage"] = share(values, "num_slots_in_use", "num_slots");
  const bool is_asleep = values["is_asleep"] > 0, needs_weights = values["needs_weights"] > 0;
  values["is_awake"] = is_asleep ? 0 : 1;
  values["is_asleep_at_1"] = is_asleep && !needs_weights ? 1 : 0;
  values["is_asleep_at_2"] = is_asleep && needs_weights ? 1 : 0;
  values["prompt_tokens_per_s"] = prompt_tokens.add(of.time, values["num_prompt_tokens"]);
  values["generation_tokens_per_s"] =
      generation_tokens.add(of.time, values["num_tokens_generated"]);
}

HttpReply MetricsEndpoint::State::answer(std::string_view path) {
  std::shared_ptr<const Snapshot> now;
  bool is_draining = false;
  {
    const std::lock_guard lock(mutex);
    now = snapshot;
    is_draining = phase == ServingPhase::kDraining;
  }
  if (!now) now = std::make_shared<Snapshot>(Snapshot{.time = Clock::now()});
  if (is_draining && now->phase != ServingPhase::kDraining) {
    auto ending = std::make_shared<Snapshot>(*now);
    ending->phase = ServingPhase::kDraining;
    now = std::move(ending);
  }
  const Health health = health_of(*now, Clock::now(), limits);
  if (path == "/health") {
    return {.status = health.is_well ? 200 : 503,
            .content_type = "application/json",
            .body = health_json(health, *now)};
  }
  if (path == "/metrics") {
    return {.content_type = "text/plain; version=0.0.4; charset=utf-8",
            .body = text_of(now, health)};
  }
  if (path == "/") return {.body = "rollpack: /metrics for Prometheus, /health for probes\n"};
  return {.status = 404, .body = "only /metrics and /health\n"};
}

// Written once a snapshot, however often it is asked for.
const std::string& MetricsEndpoint::State::text_of(const std::shared_ptr<const Snapshot>& of,
                                                   const Health& health) {
  if (written == of && written_health.is_well == health.is_well) return text;
  text = metrics_text(metric_families(*of, health, labels));
  written = of;
  written_health = health;
  return text;
}

MetricsEndpoint::MetricsEndpoint(const Config& config, const Dispatcher& dispatcher,
                                 bridge::Server& server)
    : state_(std::make_shared<State>(config, dispatcher, server)) {
  http_ = std::make_unique<HttpServer>(
      config.metrics.port, [state = state_](std::string_view path) { return state->answer(path); });
  sampler_ =
      std::make_unique<BoundedThread>([state = state_] { state->sample_until_stopped(state); });
  http_->start();
}

MetricsEndpoint::~MetricsEndpoint() {
  http_.reset();
  {
    const std::lock_guard lock(state_->mutex);
    state_->is_stopped = true;
  }
  state_->changed.notify_all();
  sampler_->join(kSamplerStopTimeout);
}

int MetricsEndpoint::port() const {
  return http_->port();
}

void MetricsEndpoint::set_phase(ServingPhase phase) {
  std::unique_lock lock(state_->mutex);
  state_->phase = phase;
  state_->changed.notify_all();
  if (phase == ServingPhase::kDraining) return;  // said so at once, whatever the snapshot says
  state_->changed.wait_for(lock, kFirstSnapshotTime,
                           [&] { return state_->snapshot && state_->snapshot->phase == phase; });
}

}  // namespace rollpack::rollout
