// bridge_client_process: a client that a test can kill. Connects, does what it is told, prints one
// line and waits for its end.
//   --take N      take N batches of one group each; prints their batch_seq
//   --release N   release the first N of them
//   --begin N     begin a weight update to version N
//   --fork        leave the socket open in a child that lives on
//   --uid N       become that user first; prints the server's error
#include <fmt/format.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <string>

#include "tests/trainer_bridge/server/test_client.h"

namespace {

using rollpack::bridge::Json;
using rollpack::bridge::TestClient;

struct Orders {
  std::string socket;
  int take = 0;
  int release = 0;
  int64_t begin = 0;
  bool forks = false;
  int uid = -1;
};

std::string carry_out(const Orders& orders, TestClient& client) {
  std::string line = "taken";
  std::vector<Json> batches;
  for (int i = 0; i < orders.take; ++i) {
    batches.push_back(client.next_batch(1));
    client.bytes_of(batches.back());
    line += fmt::format(" {}", batches.back().at("batch_seq").get<uint64_t>());
  }
  for (int i = 0; i < orders.release; ++i) client.release(batches[static_cast<size_t>(i)]);
  if (orders.begin > 0) {
    client.request("update_weights", {{"phase", "begin"}, {"version", orders.begin}});
  }
  return line;
}

void run(const Orders& orders) {
  if (orders.uid >= 0 && ::setuid(static_cast<uid_t>(orders.uid)) != 0) ::_exit(3);
  TestClient client(orders.socket, /*says_hello=*/orders.uid < 0);
  std::string line;
  if (orders.uid >= 0) {
    line = format_error(rollpack::bridge::error_from_map(client.reply().at("error")));
  } else {
    line = carry_out(orders, client);
  }
  if (orders.forks && ::fork() == 0) {
    ::sleep(5);  // holds the socket open well beyond its parent's death
    ::_exit(0);
  }
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
  ::pause();
}

}  // namespace

int main(int argc, char** argv) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // never outlives its test
  Orders orders;
  CLI::App app("A client for tests to kill.");
  app.add_option("--socket", orders.socket)->required();
  app.add_option("--take", orders.take);
  app.add_option("--release", orders.release);
  app.add_option("--begin", orders.begin);
  app.add_flag("--fork", orders.forks);
  app.add_option("--uid", orders.uid);
  CLI11_PARSE(app, argc, argv);
  try {
    run(orders);
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
    return 1;
  }
  return 0;
}
