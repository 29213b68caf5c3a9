// The trainer of a simulated job with a journal, over the real delivery and real slots: it takes
// batches, consumes them, saves that it has, and gives them back. It may die at any time, as may
// the job; what it has saved outlives both.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "tests/rollout/cluster/simulated_journal.h"
#include "trainer_bridge/delivery/delivery.h"

namespace rollpack::rollout::simulation {

using SampleName = std::tuple<int64_t, int32_t, int32_t>;  // request, prompt, sample

// One life of rank 0, but for its dispatcher.
struct Life {
  Life(World& world, const std::shared_ptr<testing::Disk>& disk);

  SimulatedJournal journal;
  std::unique_ptr<bridge::BatchLayout> layout;
  bridge::SlotRing slots;
  bridge::Delivery delivery;
};

class SimulatedTrainer {
 public:
  SimulatedTrainer(World& world, int32_t num_ranks) : world_(world), clients_(num_ranks) {}

  // Connects to a new life of rank 0.
  void connect(Life& life);
  // The life is over.
  void lose_job();
  void turn();

  // A request that was accepted, as the client was told; and one that never was after all.
  void expect(const SampleName& name) { expected_.insert(name); }
  bool is_done() const { return ended_.size() >= expected_.size() && num_held() == 0; }
  int64_t num_missing() const {
    return static_cast<int64_t>(expected_.size()) - static_cast<int64_t>(ended_.size());
  }
  // Whether its end is on disk, so that it must not be made again.
  bool is_released(const SampleName& name) const { return released_.contains(name); }
  bool has_ended(const SampleName& name) const { return ended_.contains(name); }

 private:
  struct Client {
    uint64_t number = 0;
    std::vector<bridge::BatchNotice> held;
  };
  // What a batch held when it was first seen.
  struct Seen {
    std::set<SampleName> names;  // failures included
    std::map<SampleName, std::tuple<int64_t, bool, std::vector<int32_t>>> samples;
  };

  size_t num_held() const;
  void connect(Client& client);
  void ask(Client& client);
  void receive(uint64_t number, const bridge::BatchNotice& notice);
  void compare(const bridge::BatchNotice& notice);
  void consume(Client& client, size_t index);
  void give_back(const Client& client, const bridge::BatchNotice& notice);
  Seen look(const bridge::BatchNotice& notice);

  World& world_;
  Life* life_ = nullptr;
  std::vector<Client> clients_;  // by data-parallel rank; one alone is none
  uint64_t num_clients_ = 0;
  std::set<SampleName> expected_, ended_, released_;
  std::set<uint64_t> consumed_;  // what state_dict() says
  std::map<uint64_t, Seen> seen_;
};

}  // namespace rollpack::rollout::simulation
