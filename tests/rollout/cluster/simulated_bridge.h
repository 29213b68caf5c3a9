// Bridges of nodes other than rank 0's in a simulated cluster: the real stores of samples that wait
// for word, over wires that are made up, and the real NodeDesk at rank 0.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "rollout/node_bridge/kept_store.h"
#include "rollout/node_bridge/node_desk.h"
#include "rollout/node_bridge/node_messages.h"
#include "tests/rollout/cluster/simulated_world.h"

namespace rollpack::rollout::simulation {

class SimulatedBridge {
 public:
  // What its clients get goes to `sink`.
  SimulatedBridge(World& world, bridge::SampleSink& sink)
      : world_(world), sink_(sink), store_(sink) {}

  bool is_alive() const { return is_alive_; }
  // With its process. What it had asked for ends.
  void die() { is_alive_ = false; }

  // From rank 0.
  void send(std::vector<uint8_t> frame);
  // From a worker, of this node or another: in order for each of them; `arrived`, if any, is called
  // when it is there.
  void put(int32_t worker, int32_t attempt, bridge::Sample sample, std::function<void()> arrived);
  // `worker` has connected; and its connection ends, after what it has sent or some of that.
  void begin(int32_t worker) { store_.begin(worker); }
  void end(int32_t worker, bool loses_tail);

  // One turn of the process: what has arrived. `answer` takes frames to rank 0.
  using Answer = std::function<void(std::vector<uint8_t> frame)>;
  void turn(const Answer& answer);

  int64_t num_kept() const { return store_.num_samples(); }
  bool is_quiet() const { return from_rank_0_.empty() && num_from_workers_ == 0; }

 private:
  struct FromRank0 {
    int64_t arrives_ms = 0;
    std::vector<uint8_t> frame;
  };
  struct FromWorker {
    int64_t arrives_ms = 0;
    int32_t attempt = 0;
    bridge::Sample sample;
    std::function<void()> arrived;
    bool is_end = false;
  };
  // After `last_ms`; by so much later where the link is slow.
  int64_t arrival(int64_t last_ms, int64_t slow_ms);
  void hear_rank_0(const Answer& answer);

  World& world_;
  bridge::SampleSink& sink_;
  bool is_alive_ = true;
  KeptStore store_;
  std::deque<FromRank0> from_rank_0_;
  std::map<int32_t, std::deque<FromWorker>> from_workers_;
  size_t num_from_workers_ = 0;
};

// All of them; node n's is held by worker n.
class SimulatedBridges {
 public:
  using Workers = std::vector<std::shared_ptr<SimulatedWorker>>;
  // What clients get, at rank 0's node too, goes to `sink`. All of them outlive this.
  SimulatedBridges(World& world, Dispatcher& dispatcher, bridge::SampleSink& sink,
                   const Workers& workers, int32_t num_nodes);

  // One turn of all that are there and of rank 0's end; calls `lose` with the node of each that is
  // gone, once.
  void turn(const std::function<void(int32_t node)>& lose);
  // Any node whose trainers can ask for something, rank 0's too.
  int32_t pick_node();
  // Lets the holder of one that is there stand still; false where none is.
  bool stop_one();
  bool has_lost_one() const { return !lost_.empty(); }
  bool is_quiet() const;
  // When all is done: nothing may be left anywhere.
  void check_end();

 private:
  World& world_;
  const Workers& workers_;
  SimulatedWorker::Bridges bridges_;  // by node
  std::vector<std::function<void()>> later_;
  NodeDesk desk_;
  std::set<int32_t> lost_;  // nodes
};

}  // namespace rollpack::rollout::simulation
