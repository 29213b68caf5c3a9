// /metrics and /health of a serving job, on a port of 127.0.0.1.
//
// Twice a second a thread of its own asks dispatcher and bridge for their numbers and puts them up
// as a Snapshot; the HTTP thread reads that and nothing else. So no scrape, and no number of them,
// touches a lock of the engine, and /health answers though dispatcher or bridge may hang.
#pragma once

#include <memory>

#include "rollout/cluster/dispatcher.h"
#include "rollout/config/config.h"
#include "rollout/metrics/health.h"
#include "rollout/metrics/snapshot.h"
#include "trainer_bridge/server/server.h"

namespace rollpack::rollout {

class MetricsEndpoint {
 public:
  // Listens at config.metrics.port (0 or more) and answers, under ServingPhase::kStarting.
  // `dispatcher` and `server` outlive it.
  // Errors: unavailable naming metrics.port.
  MetricsEndpoint(const Config& config, const Dispatcher& dispatcher, bridge::Server& server);
  // Waits half a second at most for its threads.
  ~MetricsEndpoint();

  int port() const;
  // kServing: the server was started. Returns when what is answered says so, within 200 ms.
  void set_phase(ServingPhase phase);

 private:
  struct State;
  std::shared_ptr<State> state_;
  std::unique_ptr<class HttpServer> http_;
  std::unique_ptr<class BoundedThread> sampler_;
};

}  // namespace rollpack::rollout
