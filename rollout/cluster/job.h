// One run of rollpack over its ranks: rank 0's replica, worker and dispatcher with links to all
// other ranks; or one worker rank that does what rank 0 says.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "rollout/cluster/dispatcher.h"
#include "rollout/cluster/launch.h"
#include "rollout/cluster/private_folder.h"
#include "rollout/cluster/rank_link.h"
#include "rollout/cluster/replica_placement.h"
#include "rollout/cluster/worker.h"
#include "rollout/engine/replica.h"
#include "rollout/node_bridge/node_desk.h"
#include "rollout/tensor_parallel/leader.h"

namespace rollpack::rollout {

struct JobOptions {
  bool profiles = false;  // every rank times its ops
  bool serves = false;    // trainers, over bridges
};

// Rank 0.
class Job {
 public:
  // Loads the model; other ranks load theirs meanwhile.
  Job(const Config& config, Launch& launch, const JobOptions& options);
  ~Job();

  // Starts the workers and waits until every rank is ready. The dispatcher's sink must be set.
  // Errors: whatever a rank reports, or deadline_exceeded naming those that are not ready.
  void start();
  // Ends all workers; with hand_back open samples reach the sink as partial samples first.
  void stop(bool hand_back);

  // The bridges of other nodes, where there are any: samples for them go there, others to `own`.
  // Before start(); nullptr where there are none.
  NodeDesk* make_node_desk(bridge::SampleSink& own);

  // Nodes with a bridge, rank 0's included.
  int32_t num_bridges() const;

  Dispatcher& dispatcher() { return *dispatcher_; }
  const Replica& replica() const { return *replica_; }
  const Config& config() const { return config_; }
  int num_ranks() const { return num_replicas() * config_.engine.tensor_model_parallel_size; }
  int num_replicas() const { return placement_.num_ranks; }
  int num_threads() const { return num_threads_; }  // of one rank

 private:
  void meet_ranks();
  int32_t node_of(int32_t rank) const;

  const Config config_;
  const Placement placement_;  // of replicas' leaders, by replica
  const bool survives_deaths_;
  const int num_threads_;
  Launch& launch_;
  std::optional<PrivateFolder> folder_;  // holds the rank socket while ranks connect
  std::unique_ptr<RankHub> hub_;
  std::optional<LeadingRank> leading_;  // where further ranks hold parts of the model
  std::unique_ptr<Replica> replica_;
  std::unique_ptr<Dispatcher> dispatcher_;
  std::unique_ptr<NodeDesk> desk_;
  std::shared_ptr<Worker> worker_;
  std::string line_;  // what ranks are told when they meet
  bool shares_weights_ = false;
  bridge::OwnedFd first_weights_;  // the packed set of a shared start
};

// Any other rank: works until rank 0 says stop, or is gone, then leaves the process.
[[noreturn]] void run_worker_rank(const Config& config, Launch& launch, const JobOptions& options);

}  // namespace rollpack::rollout
