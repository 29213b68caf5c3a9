#include "rollout/cluster/job.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <optional>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <spdlog/spdlog.h>

#include "kernels/base/error.h"
#include "kernels/base/fault_point.h"
#include "kernels/machine_limits.h"
#include "kernels/registry.h"
#include "rollout/cluster/meeting.h"
#include "rollout/cluster/rank_acceptor.h"
#include "rollout/cluster/weight_sharing.h"
#include "rollout/node_bridge/node_bridge.h"
#include "rollout/node_bridge/sample_way.h"
#include "rollout/node_bridge/server_options.h"
#include "rollout/tensor_parallel/follower.h"

namespace rollpack::rollout {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

// Loading a large model from a cold disk takes minutes; longer than this, a rank is stuck.
constexpr auto kStartTimeout = 30min;
// mpirun follows SIGTERM with SIGKILL after 1 s; the rest is for writing what was handed back.
constexpr auto kStopTimeout = 600ms;
// Ranks connect as soon as they have met; those of other nodes try several addresses in turn.
constexpr auto kConnectTimeout = 30s;

int threads_per_rank(const EngineSection& engine, const Placement& placement) {
  if (engine.num_threads > 0) return engine.num_threads;
  return kernels::usable_cores().num_threads(placement.cpus.num_processes,
                                             placement.num_ranks_on_node);
}

DType compute_dtype(const Config& config) {
  return config.model.dtype == "float32" ? DType::kF32 : DType::kBF16;
}

std::chrono::milliseconds lease_of(const Config& config) {
  return std::chrono::milliseconds(std::llround(config.cluster.lease_s * 1000));
}

// `placement` is that of the replicas' leaders.
void connect_to_rank_0(const Config& config, const Launch& launch, const Placement& placement,
                       const Meeting& meeting, std::optional<RankClient>& client) {
  const auto deadline = Clock::now() + kConnectTimeout;
  if (const auto& order = launch.join_order()) {
    client.emplace(bridge::OwnedFd(order->socket));
  } else if (placement.is_on_first_node()) {
    client.emplace(connect_on_this_node(meeting, placement.rank, deadline));
  } else {
    const ClusterSection& cluster = config.cluster;
    RemoteConnection made = connect_from_other_node(
        meeting, placement.rank, {.port = cluster.port, .num_ports = cluster.num_ports}, deadline);
    // Longer than rank 0 waits for us: it may be stopped for a while, and go on.
    watch_tcp(made.socket.get(), 2 * lease_of(config));
    client.emplace(std::move(made.socket),
                   std::make_unique<NodeMemory>(meeting.job, placement.rank));
    if (made.relay) client->relay(std::move(*made.relay), meeting, lease_of(config));
  }
}

bool has_node_bridges(const Config& config) {
  return config.bridge.endpoints == "per_node";
}

// The bridge of this node, where it is this rank's to hold and not rank 0's, and the way of the
// rank's samples.
struct NodeSide {
  std::optional<NodeBridge> bridge;
  std::optional<StraightWay> straight;
  std::optional<SampleWay> way;
};

void join_node_bridge(const Config& config, const ModelConfig& model, const Placement& placement,
                      const Meeting& meeting, RankClient& client, const SampleWay::TellRank0& tell,
                      NodeSide& side) {
  const int node = placement.node();
  const int holder = placement.first_ranks()[static_cast<size_t>(node)];
  side.straight.emplace(
      StraightWay::Options{.rank = placement.rank,
                           .token = meeting.token,
                           .answer = meeting.answer,
                           .limit = lease_of(config) / 2},
      StraightWay::Ways{.tell = tell, .find = [&client](const NodeRequest& request) {
                          try {
                            client.send_node_frame(encode(request));
                          } catch (const Error&) {  // as in tell
                          }
                        }});
  const auto hear = [&side](const told::BridgeAt& bridge) { side.straight->found(bridge); };
  if (placement.rank != holder) {
    side.way.emplace(node, placement.rank,
                     std::make_unique<SampleOutlet>(meeting.job, holder, lease_of(config) / 2),
                     tell);
    client.set_on_node_frame([hear](const std::vector<uint8_t>& frame) {
      const NodeNews news = decode_node_news(frame);
      if (const auto* bridge = std::get_if<told::BridgeAt>(&news)) hear(*bridge);
    });
  } else {
    side.bridge.emplace(
        config, model.written_pad_id(),
        NodeBridge::Place{
            .job = meeting.job, .rank = placement.rank, .weights_place = meeting.weights_place},
        [&client](std::vector<uint8_t> frame) { client.send_node_frame(std::move(frame)); });
    side.bridge->set_on_bridge_at(hear);
    client.set_on_node_frame(
        [&side](std::vector<uint8_t> frame) { side.bridge->handle(std::move(frame)); });
    client.set_take_samples([&side](int32_t worker, bridge::OwnedFd socket) {
      side.bridge->admit(worker, std::move(socket));
    });
    side.way.emplace(node, *side.bridge, tell);
  }
  side.way->set_straight_way(*side.straight);
}

// Where several ranks hold a model: the leader's, once all others have connected.
std::optional<LeadingRank> lead(const Config& config, const Meeting& meeting, int replica) {
  const int32_t size = config.engine.tensor_model_parallel_size;
  if (size == 1) return std::nullopt;
  const auto deadline = Clock::now() + kConnectTimeout;
  auto followers = accept_followers({meeting.job, replica}, size, deadline);
  kernels::DeviceLink link =
      kernels::make_device_link(kernels::choose_backend(config.engine.backend).name);
  if (!link.why_none.empty()) {
    spdlog::warn("replica {} exchanges through host memory: {}", replica, link.why_none);
  }
  return LeadingRank(std::move(followers), lease_of(config), deadline, std::move(link.bytes));
}

std::unique_ptr<Replica> make_replica(std::optional<LeadingRank>& leading, const Config& config,
                                      const ModelConfig& model, const ReplicaOptions& options) {
  if (!leading) return std::make_unique<Replica>(config, model, options);
  return leading->make_replica(config, model, options, Clock::now() + kStartTimeout);
}

void load_checkpoint(std::optional<LeadingRank>& leading, Replica& replica) {
  leading ? leading->load_checkpoints(replica) : replica.load_checkpoint();
}

// Where memory runs out a worker can be replaced and rank 0 cannot.
void be_the_first_to_go() {
  std::ofstream("/proc/self/oom_score_adj") << 500;
}

}  // namespace

Job::Job(const Config& config, Launch& launch, const JobOptions& options)
    : config_(config),
      placement_(
          place_replicas(launch.placement(), config.engine.tensor_model_parallel_size).leaders),
      survives_deaths_(launch.survives_deaths()),
      num_threads_(threads_per_rank(config.engine, launch.placement())),
      launch_(launch) {
  const ModelConfig model = read_model_config(config.model.path);
  const kernels::BackendChoice backend = kernels::choose_backend(config.engine.backend);
  if (!backend.passed_over.empty()) {
    spdlog::info("engine.backend auto takes {}; {}", backend.name, backend.passed_over);
  }
  WeightSharing sharing =
      backend.name == "cuda" && config.engine.share_weights == "auto"
          ? WeightSharing{false, "each rank's lie in the memory of its device"}
          : decide_weight_sharing(config.engine.share_weights, placement_.most_ranks_on_a_node(),
                                  weight_bytes(model, compute_dtype(config)));
  if (config.engine.tensor_model_parallel_size > 1) sharing = {false, "each rank holds a part"};
  shares_weights_ = sharing.is_shared && num_replicas() > 1;
  meet_ranks();
  replica_ = make_replica(leading_, config, model,
                          {.num_threads = num_threads_,
                           .cpus = placement_.cpus,
                           .rank_on_node = placement_.rank_on_node,
                           .shared_weights = shares_weights_,
                           .profiles = options.profiles});
  load_checkpoint(leading_, *replica_);
  if (shares_weights_) {
    first_weights_ = bridge::OwnedFd::duplicate(replica_->backend().export_staged_weights());
  }
  replica_->backend().commit_weights();
  const kernels::BackendInfo& info = replica_->backend().info();
  spdlog::info("{}; peak {:.2f} TFLOP/s; {}; {} ranks; {} KV pages of {} tokens; weights {} ({})",
               info.description,
               kernels::estimate_peak_flops(compute_dtype(config), num_threads_) * 1e-12,
               kernels::usable_cores().text(), num_ranks(), info.kv.num_pages, info.kv.page_tokens,
               shares_weights_ ? "shared" : "private", sharing.reason);
  dispatcher_ = std::make_unique<Dispatcher>(
      config, model, replica_->limits(), info.fingerprint, replica_->backend().weights_hash(),
      shares_weights_, RecoveryOptions{.is_on = survives_deaths_, .lease = lease_of(config)});
}

// Every rank learns how it reaches this one, and does so before anyone loads anything.
void Job::meet_ranks() {
  Meeting meeting{.shares_weights = shares_weights_,
                  .weights_place = fmt::format("{}, on {}", socket_path(config_), host_name())};
  std::optional<RankAcceptor> acceptor;
  if (num_ranks() > 1) meeting.job = random_token();
  if (num_replicas() > 1) {
    folder_.emplace();
    meeting.socket = folder_->path() + "/ranks.sock";
    meeting.token = random_token();
    meeting.answer = random_token();
    bridge::OwnedFd tcp;
    if (placement_.has_other_nodes()) {
      TcpListener listener = listen_tcp({.interface = config_.cluster.interface,
                                         .port = config_.cluster.port,
                                         .num_ports = config_.cluster.num_ports});
      tcp = std::move(listener.socket);
      meeting.endpoint = std::move(listener.endpoint);
      spdlog::info("{} nodes; ranks of others connect to {} port {}", placement_.num_nodes(),
                   fmt::join(meeting.endpoint.addresses, ", "), meeting.endpoint.port);
    }
    acceptor.emplace(meeting, std::move(tcp), num_replicas());
  }
  std::vector<AcceptedRank> ranks;
  line_ = launch_.meet(meeting.text(), [&](const std::string&) {
    if (acceptor)
      ranks = acceptor->accept(Clock::now() + kConnectTimeout,
                               [this] { return launch_.has_heard_of_failure(); });
    leading_ = lead(config_, meeting, placement_.rank);
  });
  if (!acceptor) return;
  hub_ = std::make_unique<RankHub>(
      std::move(ranks), RankHub::Options{.num_ranks = num_replicas(),
                                         .num_ranks_on_node = placement_.num_ranks_on_node,
                                         .node_of_rank = placement_.node_of_rank,
                                         .may_miss = survives_deaths_,
                                         .lease = lease_of(config_),
                                         .on_lost_host = [this] { launch_.note_lost_host(); }});
}

Job::~Job() {
  if (worker_) worker_->stop();  // its events go to the dispatcher
  hub_.reset();
}

void Job::start() {
  const auto deadline = Clock::now() + kStartTimeout;
  Dispatcher& dispatcher = *dispatcher_;
  worker_ = std::make_shared<Worker>(
      *replica_, [&dispatcher](Event event) { dispatcher.handle(0, std::move(event)); },
      make_reference_replica(config_, replica_->model(), num_threads_));
  dispatcher.add_worker(worker_);
  worker_->start();
  const bool is_whole = config_.engine.tensor_model_parallel_size == 1;
  if (hub_ && survives_deaths_ && config_.cluster.replace_lost && !is_whole) {
    spdlog::info(
        "a replica that loses a rank ends, and is not replaced: "
        "engine.tensor_model_parallel_size is not 1");
  }
  if (hub_ && survives_deaths_ && config_.cluster.replace_lost && is_whole) {
    dispatcher.set_replace(
        [this](int rank_on_node) { hub_->start_replacement(*dispatcher_, rank_on_node, line_); });
  }
  if (hub_) hub_->serve(dispatcher);
  if (shares_weights_) dispatcher.share_first_weights(std::move(first_weights_));
  dispatcher.wait_ready(deadline);
  folder_.reset();
}

int32_t Job::num_bridges() const {
  return has_node_bridges(config_) ? placement_.num_nodes() : 1;
}

NodeDesk* Job::make_node_desk(bridge::SampleSink& own) {
  std::vector<int32_t> bridges = placement_.first_ranks();
  bridges.erase(bridges.begin());
  if (!has_node_bridges(config_) || bridges.empty()) return nullptr;
  RankHub& hub = *hub_;
  desk_ = std::make_unique<NodeDesk>(
      *dispatcher_, own, std::move(bridges),
      NodeDesk::Ways{.send =
                         [&hub](int32_t worker, std::vector<uint8_t> frame) {
                           hub.send_node_frame(worker, std::move(frame));
                         },
                     .later = [&hub](std::function<void()> task) { hub.post(std::move(task)); },
                     .node_of = [this](int32_t worker) { return node_of(worker); },
                     .endpoint_of = [&hub](int32_t worker) { return hub.endpoint_of(worker); }});
  hub.set_on_lease_check(
      [&desk = *desk_, lease = lease_of(config_)] { desk.check_bridges(Clock::now(), lease); });
  hub.set_on_node_frame([&desk = *desk_](int32_t worker, std::vector<uint8_t> frame) {
    desk.handle(worker, std::move(frame));
  });
  return desk_.get();
}

// Replacements are numbered after mpirun's ranks, and run on this node.
int32_t Job::node_of(int32_t rank) const {
  const auto place = static_cast<size_t>(rank);
  return place < placement_.node_of_rank.size() ? placement_.node_of_rank[place] : 0;
}

void Job::stop(bool hand_back) {
  dispatcher_->stop(hand_back, Clock::now() + kStopTimeout);
}

namespace {

// This rank's place, or none where rank 0 refuses to start, and says why.
std::optional<ReplicaPlacement> own_place(const Config& config, const Launch& launch) {
  try {
    return place_replicas(launch.placement(), config.engine.tensor_model_parallel_size);
  } catch (const Error&) {
    return std::nullopt;
  }
}

// A rank that holds a part of a model and does what its leader says, until that has gone.
[[noreturn]] void run_follower_rank(const Config& config, Launch& launch,
                                    const ReplicaPlacement& place, const JobOptions&) {
  bridge::OwnedFd leader;
  const std::string line = launch.meet("", [&](const std::string& text) {
    leader = connect_to_leader({Meeting::parse(text).job, place.leaders.rank}, place.at,
                               Clock::now() + kConnectTimeout);
  });
  if (line.empty()) launch.exit(1);  // rank 0 has said why
  be_the_first_to_go();
  try {
    Welcome welcome =
        join_replica(leader.get(), place.at, lease_of(config), Clock::now() + kConnectTimeout);
    follow(std::move(leader), config, read_model_config(config.model.path),
           {.num_threads = threads_per_rank(config.engine, launch.placement()),
            .cpus = launch.placement().cpus,
            .rank_on_node = launch.placement().rank_on_node,
            .communicator = std::move(welcome.communicator),
            .device_link = std::move(welcome.device_link)});
    launch.exit(0);
  } catch (const Error& error) {
    spdlog::error("{}", error.what());
    launch.exit(1);
  }
}

}  // namespace

void run_worker_rank(const Config& config, Launch& launch, const JobOptions& options) {
  std::optional<RankClient> connected;
  std::optional<LeadingRank> leading;
  Meeting meeting;
  const std::optional<ReplicaPlacement> place = own_place(config, launch);
  if (place && !place->is_leader()) run_follower_rank(config, launch, *place, options);
  const std::string line = launch.meet("", [&](const std::string& text) {
    meeting = Meeting::parse(text);
    connect_to_rank_0(config, launch, place.value().leaders, meeting, connected);
    leading = lead(config, meeting, place->leaders.rank);
  });
  if (line.empty()) launch.exit(1);  // rank 0 has said why
  RankClient& client = *connected;
  be_the_first_to_go();
  fault_at(FaultPoint::kWorkerConnected);
  const auto tell_rank_0 = [&client](const Event& event) {
    try {
      client.send(event);
    } catch (const Error&) {
      // Rank 0 is gone: receive() below is told so too, and ends this rank.
    }
  };
  NodeSide side;
  try {
    const int num_threads = threads_per_rank(config.engine, launch.placement());
    const ModelConfig model = read_model_config(config.model.path);
    if (options.serves && has_node_bridges(config) && !place->leaders.is_on_first_node()) {
      join_node_bridge(config, model, place->leaders, meeting, client, tell_rank_0, side);
    }
    const std::unique_ptr<Replica> made =
        make_replica(leading, config, model,
                     {.num_threads = num_threads,
                      .cpus = launch.placement().cpus,
                      .rank_on_node = launch.placement().rank_on_node,
                      .shared_weights = meeting.shares_weights,
                      .profiles = options.profiles});
    Replica& replica = *made;
    if (!meeting.shares_weights) {
      load_checkpoint(leading, replica);
      replica.backend().commit_weights();
    }
    const auto emit = [&](Event event) {
      side.way ? side.way->send(std::move(event)) : tell_rank_0(event);
    };
    Worker worker(replica, emit, make_reference_replica(config, replica.model(), num_threads));
    worker.start(/*has_weights=*/!meeting.shares_weights);
    while (std::optional<Command> command = client.receive()) {
      const bool stops = std::holds_alternative<Stop>(*command);
      if (side.way) side.way->expect(*command);
      worker.send(std::move(*command));
      if (!stops) continue;
      worker.join();
      if (side.bridge) side.bridge->stop();
      // Rank 0 leaves first: where mpirun ends a job it sends SIGKILL to all ranks as soon as one
      // has gone, and rank 0 may still be writing what was handed back.
      client.receive();
      launch.exit(0);
    }
    spdlog::error("rank 0 is gone");
    if (side.bridge) {
      side.bridge->stop(ErrorInfo{.code = ErrorCode::kUnavailable,
                                  .field = "rank 0",
                                  .value = "gone",
                                  .message = "the job has ended for this node"});
    }
    launch.exit(1);  // a step under way may take seconds; nobody waits for its result
  } catch (const Error& error) {
    spdlog::error("{}", error.what());
    tell_rank_0(WorkerFailed{error.info});
    if (side.bridge) side.bridge->stop(error.info);
    launch.exit(1);
  }
}

}  // namespace rollpack::rollout
