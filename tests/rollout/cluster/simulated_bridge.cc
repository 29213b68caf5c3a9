#include "tests/rollout/cluster/simulated_bridge.h"

#include <algorithm>
#include <utility>
#include <variant>

#include "rollout/node_bridge/sample_frame.h"

namespace rollpack::rollout::simulation {
namespace {

// A ping and its answer come within a lease; a receipt need not come within half of one.
constexpr int64_t kSlowRank0Ms = 400, kSlowWorkerMs = 1500;

}  // namespace

int64_t SimulatedBridge::arrival(int64_t last_ms, int64_t slow_ms) {
  int64_t arrives_ms = world_.now_ms + world_.dice.below(200);
  if (world_.dice.chance(world_.fault_rate)) {
    arrives_ms += slow_ms;
    world_.fault(Fault::kSlowLink);
  }
  return std::max(arrives_ms, last_ms);
}

void SimulatedBridge::send(std::vector<uint8_t> frame) {
  if (!is_alive_) return;
  const int64_t last_ms = from_rank_0_.empty() ? 0 : from_rank_0_.back().arrives_ms;
  from_rank_0_.push_back({arrival(last_ms, kSlowRank0Ms), std::move(frame)});
}

void SimulatedBridge::put(int32_t worker, int32_t attempt, bridge::Sample sample,
                          std::function<void()> arrived) {
  if (!is_alive_) return;
  auto& wire = from_workers_[worker];
  const int64_t arrives_ms = arrival(wire.empty() ? 0 : wire.back().arrives_ms, kSlowWorkerMs);
  wire.push_back({arrives_ms, attempt, std::move(sample), std::move(arrived)});
  ++num_from_workers_;
}

void SimulatedBridge::end(int32_t worker, bool loses_tail) {
  auto& wire = from_workers_[worker];
  if (loses_tail && !wire.empty()) {
    const auto num_left = static_cast<size_t>(world_.dice.below(static_cast<int64_t>(wire.size())));
    num_from_workers_ -= wire.size() - num_left;
    wire.resize(num_left);
  }
  wire.push_back({.arrives_ms = arrival(wire.empty() ? 0 : wire.back().arrives_ms, kSlowWorkerMs),
                  .attempt = 0,
                  .sample = {},
                  .arrived = {},
                  .is_end = true});
  ++num_from_workers_;
}

void SimulatedBridge::turn(const Answer& answer) {
  // Either way first.
  const bool hears_rank_0_first = world_.dice.chance(0.5);
  if (hears_rank_0_first) hear_rank_0(answer);
  for (auto& [worker, wire] : from_workers_) {
    while (!wire.empty() && wire.front().arrives_ms <= world_.now_ms) {
      FromWorker next = std::move(wire.front());
      wire.pop_front();
      --num_from_workers_;
      if (next.is_end) {
        store_.end(worker);
        continue;
      }
      store_.keep(worker, next.attempt, std::move(next.sample));
      if (next.arrived) next.arrived();
    }
  }
  if (!hears_rank_0_first) hear_rank_0(answer);
}

void SimulatedBridge::hear_rank_0(const Answer& answer) {
  while (!from_rank_0_.empty() && from_rank_0_.front().arrives_ms <= world_.now_ms) {
    std::vector<uint8_t> frame = std::move(from_rank_0_.front().frame);
    from_rank_0_.pop_front();
    if (is_sample_frame(frame)) {
      const size_t num_bytes = frame.size();
      sink_.commit(decode_sample_frame(std::move(frame)).sample);
      answer(encode(asked::Received{num_bytes}));
      continue;
    }
    NodeNews news = decode_node_news(frame);
    if (auto* failed = std::get_if<told::Failed>(&news)) sink_.fail(std::move(failed->sample));
    if (const auto* decided = std::get_if<told::Decided>(&news)) {
      store_.decide(decided->worker, decided->key, decided->attempt, decided->verdict);
    }
    if (const auto* forgotten = std::get_if<told::Forgotten>(&news)) {
      store_.forget(forgotten->worker);
    }
    if (std::holds_alternative<told::Ping>(news)) answer(encode(asked::Present{}));
  }
}

namespace {

std::vector<int32_t> holders_of(int32_t num_nodes) {
  std::vector<int32_t> holders;
  for (int32_t node = 1; node < num_nodes; ++node) holders.push_back(node);
  return holders;
}

}  // namespace

SimulatedBridges::SimulatedBridges(World& world, Dispatcher& dispatcher, bridge::SampleSink& sink,
                                   const Workers& workers, int32_t num_nodes)
    : world_(world),
      workers_(workers),
      desk_(dispatcher, sink, holders_of(num_nodes),
            {.send = [this](int32_t worker,
                            std::vector<uint8_t> frame) { bridges_.at(worker)->send(frame); },
             .later = [this](std::function<void()> task) { later_.push_back(std::move(task)); },
             .node_of = [this](int32_t worker) { return workers_.at(worker)->node(); },
             .endpoint_of = [](int32_t) { return TcpEndpoint{}; }}) {
  dispatcher.set_sink(desk_);
  dispatcher.set_kept_samples(desk_);
  for (const int32_t node : holders_of(num_nodes)) {
    bridges_[node] = std::make_unique<SimulatedBridge>(world, sink);
    desk_.handle(node, encode(asked::Opened{}));
  }
  desk_.open(std::chrono::steady_clock::now());  // they have
  for (size_t i = 0; i < workers.size(); ++i) {
    const auto held = bridges_.find(static_cast<int32_t>(i));
    workers[i]->set_bridges(bridges_, held == bridges_.end() ? nullptr : held->second.get());
  }
}

void SimulatedBridges::turn(const std::function<void(int32_t node)>& lose) {
  for (const auto& [node, bridge] : bridges_) {
    if (!bridge->is_alive() || workers_[node]->stands_still()) continue;
    bridge->turn([this, holder = node](std::vector<uint8_t> frame) {
      desk_.handle(holder, std::move(frame));
    });
  }
  desk_.check_bridges(world_.time(), std::chrono::milliseconds(kLeaseMs));
  for (const auto& task : std::exchange(later_, {})) task();
  for (const auto& [node, bridge] : bridges_) {
    if (bridge->is_alive() || !lost_.insert(node).second) continue;
    world_.fault(Fault::kLostBridge);
    lose(node);
  }
}

int32_t SimulatedBridges::pick_node() {
  const auto node = static_cast<int32_t>(world_.dice.below(bridges_.size() + 1));
  return node > 0 && bridges_.at(node)->is_alive() ? node : 0;
}

// One that stands still has to be noticed first, whether it owes anything or not.
bool SimulatedBridges::is_quiet() const {
  for (const auto& [node, bridge] : bridges_) {
    if (bridge->is_alive() && (!bridge->is_quiet() || workers_[node]->stands_still())) return false;
  }
  return std::ranges::none_of(workers_, [](const auto& worker) {
    return worker->is_alive() && worker->has_samples_under_way();
  });
}

bool SimulatedBridges::stop_one() {
  for (const auto& [node, bridge] : bridges_) {
    if (!bridge->is_alive() || workers_[node]->stands_still()) continue;
    world_.fault(Fault::kStop);
    workers_[node]->stop_for(6000);
    return true;
  }
  return false;
}

void SimulatedBridges::check_end() {
  for (const auto& [node, bridge] : bridges_) {
    world_.check(!bridge->is_alive() || bridge->num_kept() == 0,
                 fmt::format("{} samples wait at node {} for word that never comes",
                             bridge->num_kept(), node));
  }
}

}  // namespace rollpack::rollout::simulation
