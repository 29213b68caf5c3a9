// fake_rollout_service: the real server over a fake service (fake_service.h says what it samples),
// for tests of clients. Says "ready" once hello succeeds; ends at SIGTERM, SIGINT or the shutdown
// verb.
#include <unistd.h>
#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>

#include "tests/trainer_bridge/server/fake_service.h"
#include "trainer_bridge/server/server.h"

namespace {

using rollpack::bridge::FakeOptions;
using rollpack::bridge::FakeService;
using rollpack::bridge::Server;
using rollpack::bridge::ServerOptions;

void serve(const ServerOptions& options, const FakeOptions& fake) {
  sigset_t ends = {};
  sigemptyset(&ends);
  sigaddset(&ends, SIGTERM);
  sigaddset(&ends, SIGINT);
  pthread_sigmask(SIG_BLOCK, &ends, nullptr);  // before any thread, so that all inherit it
  Server server(options);
  FakeService service(fake, server);
  service.on_shutdown = [] { ::kill(::getpid(), SIGTERM); };
  server.start(service);
  std::puts("ready");
  std::fflush(stdout);
  int signal = 0;
  sigwait(&ends, &signal);
  server.stop();
}

}  // namespace

int main(int argc, char** argv) {
  ServerOptions options;
  options.slot_bytes = 1 << 20;
  FakeOptions fake;
  int64_t sample_ms = 0;
  CLI::App app("A rollpack server without a model, for tests.");
  app.add_option("--socket", options.socket)->required();
  app.add_option("--layout", options.layout.layout)->capture_default_str();
  app.add_option("--columns", options.layout.columns)->delimiter(',');
  app.add_option("--max-tokens-per-row", options.layout.max_tokens_per_row)->capture_default_str();
  app.add_option("--slots", options.slots)->capture_default_str();
  app.add_option("--slot-bytes", options.slot_bytes)->capture_default_str();
  app.add_option("--max-held-samples", options.max_held_samples)->capture_default_str();
  app.add_option("--sample-ms", sample_ms, "time each sample takes")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  fake.sample_time = std::chrono::milliseconds(sample_ms);
  for (const std::string& column : options.layout.columns) fake.with_entropy |= column == "entropy";
  try {
    serve(options, fake);
  } catch (const rollpack::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
