#include <cstdio>
#include <optional>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "rollout/command/command.h"
#include "rollout/command/end_signal.h"
#include "rollout/event_log/event_log.h"
#include "rollout/metrics/metrics_endpoint.h"
#include "trainer_bridge/server/server.h"

namespace rollpack::rollout {
namespace {

constexpr int kLostRankStatus = 3;

bridge::ServerOptions server_options(const Job& job) {
  const BridgeSection& section = job.config().bridge;
  bridge::ServerOptions options;
  options.socket = section.socket;
  options.slots = section.slots;
  options.slot_bytes = section.slot_bytes;
  options.max_version_lag = section.max_version_lag;
  options.layout = {.layout = section.layout,
                    .max_tokens_per_row = section.max_tokens_per_row,
                    .prompt_width = section.prompt_width,
                    .response_width = section.response_width,
                    .pad_to_multiple_of = section.pad_to_multiple_of,
                    .columns = section.columns,
                    .logprobs_mode = job.config().rollout.logprobs_mode};
  if (!job.config().reference_model.path.empty()) {
    options.layout.columns.push_back("ref_log_prob");
  }
  return options;
}

}  // namespace

int serve(Job& job, const CommandLine&) {
  EndSignal end;
  Dispatcher& dispatcher = job.dispatcher();
  bridge::ServerOptions options = server_options(job);
  options.layout.pad_token_id = dispatcher.info().pad_token_id;
  bridge::Server server(options);
  dispatcher.set_sink(server);
  dispatcher.set_on_end([&] {
    server.health_changed();
    end.raise(0);
  });
  std::optional<MetricsEndpoint> metrics;
  if (job.config().metrics.port >= 0) {
    metrics.emplace(job.config(), dispatcher, server);
    server.set_metrics_port(metrics->port());
    spdlog::info("metrics at http://127.0.0.1:{}/metrics", metrics->port());
  }
  job.start();
  server.start(dispatcher);
  if (metrics) metrics->set_phase(ServingPhase::kServing);
  spdlog::info("serving at {}", options.socket);
  fmt::print("ready\n");
  std::fflush(stdout);
  end.wait([] { return false; });
  if (metrics) metrics->set_phase(ServingPhase::kDraining);
  const bridge::Outcome broken = dispatcher.health();
  job.stop(/*hand_back=*/!broken);
  server.stop();
  if (!broken) return 0;
  log_end(*broken);
  return kLostRankStatus;
}

}  // namespace rollpack::rollout
