#include <chrono>
#include <cstdio>
#include <optional>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "rollout/command/command.h"
#include "rollout/command/end_signal.h"
#include "rollout/event_log/event_log.h"
#include "rollout/journal/journal.h"
#include "rollout/metrics/metrics_endpoint.h"
#include "rollout/model/checkpoint.h"
#include "rollout/node_bridge/node_desk.h"
#include "rollout/node_bridge/server_options.h"
#include "trainer_bridge/server/server.h"

namespace rollpack::rollout {
namespace {

constexpr int kLostRankStatus = 3;
// Other nodes' bridges have their sockets and slots when their ranks are ready.
constexpr std::chrono::seconds kOpenTimeout{30};

// What decides a sample's bits, besides the request: the backend and the checkpoint.
std::string maker_of(const Job& job) {
  const ModelSection& model = job.config().model;
  const std::string& backend = job.replica().backend_info().fingerprint;
  if (model.load_format == "dummy") return fmt::format("{}, dummy weights", backend);
  return fmt::format("{}, checkpoint {:08x}", backend,
                     checkpoint_digest(*open_checkpoint(model.path)));
}

std::unique_ptr<Journal> open_journal(const Job& job) {
  const std::string& path = job.config().cluster.journal;
  return path.empty() ? nullptr : Journal::open(path, maker_of(job), job.num_bridges());
}

}  // namespace

int serve(Job& job, const CommandLine&) {
  EndSignal end;
  Dispatcher& dispatcher = job.dispatcher();
  bridge::ServerOptions options = server_options(job.config(), dispatcher.info().pad_token_id);
  const std::unique_ptr<Journal> journal = open_journal(job);
  if (journal) {
    options.log = journal.get();
    options.restored = journal->restored_delivery();
  }
  bridge::Server server(options);
  dispatcher.set_sink(server);
  NodeDesk* const nodes = job.make_node_desk(server);
  if (nodes) {
    dispatcher.set_sink(*nodes);
    dispatcher.set_kept_samples(*nodes);
    dispatcher.set_on_change([nodes] { nodes->tell_state(); });
    if (journal) nodes->set_journal(*journal);
  }
  dispatcher.set_on_end([&] {
    server.health_changed();
    end.raise(0);
  });
  if (journal) {
    journal->set_on_failure([&](ErrorInfo error) { dispatcher.lose_log(std::move(error)); });
    dispatcher.restore(*journal, journal->restored_requests());
  }
  std::optional<MetricsEndpoint> metrics;
  if (job.config().metrics.port >= 0) {
    metrics.emplace(job.config(), dispatcher, server);
    server.set_metrics_port(metrics->port());
    spdlog::info("metrics at http://127.0.0.1:{}/metrics", metrics->port());
  }
  job.start();
  server.start(dispatcher);
  if (nodes) nodes->open(std::chrono::steady_clock::now() + kOpenTimeout);
  if (metrics) metrics->set_phase(ServingPhase::kServing);
  spdlog::info("serving at {}", options.socket);
  fmt::print("ready\n");
  std::fflush(stdout);
  end.wait([] { return false; });
  if (metrics) metrics->set_phase(ServingPhase::kDraining);
  const bridge::Outcome broken = dispatcher.health();
  // What a journal holds goes on in the next life: whole, not as partial samples.
  job.stop(/*hand_back=*/!broken && !journal);
  server.stop();
  dispatcher.forget_log();
  if (nodes) nodes->forget_journal();
  if (!broken) return 0;
  log_end(*broken);
  return kLostRankStatus;
}

}  // namespace rollpack::rollout
