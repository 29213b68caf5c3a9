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

#include <csignal>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

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

// Its tests are the only callers, so this reads no more than they write.
Orders read_orders(int argc, char** argv) {
  Orders orders;
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    if (name == "--fork") {
      orders.forks = true;
      continue;
    }
    if (i + 1 == argc) throw std::invalid_argument(fmt::format("{} lacks its value", name));
    const std::string value = argv[++i];
    if (name == "--socket") {
      orders.socket = value;
    } else if (name == "--take") {
      orders.take = std::stoi(value);
    } else if (name == "--release") {
      orders.release = std::stoi(value);
    } else if (name == "--begin") {
      orders.begin = std::stoll(value);
    } else if (name == "--uid") {
      orders.uid = std::stoi(value);
    } else {
      throw std::invalid_argument(fmt::format("{} is not known", name));
    }
  }
  return orders;
}

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
  try {
    run(read_orders(argc, argv));
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
    return 1;
  }
  return 0;
}
