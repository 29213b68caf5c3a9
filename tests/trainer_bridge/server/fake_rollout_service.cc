// fake_rollout_service: the real server over a fake service (fake_service.h says what it samples),
// for tests of clients. Says "ready" once hello succeeds; ends at SIGTERM, SIGINT or the shutdown
// verb.
//   --socket PATH  --layout packed|padded  --columns a,b  --max-tokens-per-row N  --slots N
//   --widths P,R,MULTIPLE (of the padded layout)  --slot-bytes N  --max-held-samples N
//   --max-version-lag N  --sample-ms N (what each sample takes)
#include <fmt/format.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

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

struct Arguments {
  ServerOptions server;
  FakeOptions fake;
};

Arguments read_arguments(int argc, char** argv) {
  Arguments arguments;
  ServerOptions& server = arguments.server;
  server.slot_bytes = 1 << 20;
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    if (i + 1 == argc) throw std::invalid_argument(fmt::format("{} lacks its value", name));
    const std::string value = argv[++i];
    if (name == "--socket") {
      server.socket = value;
    } else if (name == "--layout") {
      server.layout.layout = value;
    } else if (name == "--columns") {
      std::istringstream words(value);
      for (std::string word; std::getline(words, word, ',');) {
        server.layout.columns.push_back(word);
        arguments.fake.with_entropy |= word == "entropy";
      }
    } else if (name == "--max-tokens-per-row") {
      server.layout.max_tokens_per_row = std::stoi(value);
    } else if (name == "--widths") {
      if (std::sscanf(value.c_str(), "%d,%d,%d", &server.layout.prompt_width,
                      &server.layout.response_width, &server.layout.pad_to_multiple_of) != 3) {
        throw std::invalid_argument(fmt::format("--widths {}: expected P,R,MULTIPLE", value));
      }
    } else if (name == "--slots") {
      server.slots = std::stoi(value);
    } else if (name == "--slot-bytes") {
      server.slot_bytes = std::stoll(value);
    } else if (name == "--max-held-samples") {
      server.max_held_samples = std::stoll(value);
    } else if (name == "--max-version-lag") {
      server.max_version_lag = std::stoll(value);
    } else if (name == "--sample-ms") {
      arguments.fake.sample_time = std::chrono::milliseconds(std::stoll(value));
    } else {
      throw std::invalid_argument(fmt::format("{} is not known", name));
    }
  }
  return arguments;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Arguments arguments = read_arguments(argc, argv);
    serve(arguments.server, arguments.fake);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
