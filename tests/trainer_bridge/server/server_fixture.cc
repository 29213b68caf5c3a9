#include "tests/trainer_bridge/server/server_fixture.h"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <thread>

#include "trainer_bridge/wire/owned_fd.h"

extern char** environ;

namespace rollpack::bridge {

TemporaryFolder::TemporaryFolder() {
  std::string name = std::filesystem::temp_directory_path() / "rollpack-server-XXXXXX";
  if (::mkdtemp(name.data()) == nullptr) fail_invariant("mkdtemp failed");
  path_ = name;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

void ServerTest::start(ServerOptions options, FakeOptions fake) {
  options.socket = path;
  server = std::make_unique<Server>(options);
  service = std::make_unique<FakeService>(fake, *server);
  server->start(*service);
}

void ServerTest::TearDown() {
  if (server) server->stop();
  service.reset();
}

double ServerTest::stat(TestClient& client, const std::string& name) {
  return client.request("stats").at("stats").at(name);
}

void ServerTest::wait_until(const std::function<bool()>& is_true, const std::string& what) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (!is_true()) {
    ASSERT_LT(std::chrono::steady_clock::now(), deadline) << what;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

ClientProcess::ClientProcess(const std::string& path, const std::vector<std::string>& orders) {
  int fds[2] = {-1, -1};
  if (::pipe2(fds, O_CLOEXEC) != 0) fail_invariant("pipe failed");
  const OwnedFd read_end(fds[0]);
  OwnedFd write_end(fds[1]);
  std::vector<std::string> words = {CLIENT_PROCESS, "--socket", path};
  words.insert(words.end(), orders.begin(), orders.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, write_end.get(), STDOUT_FILENO);
  const int failed = ::posix_spawn(&pid_, CLIENT_PROCESS, &actions, nullptr, argv.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (failed != 0) fail_invariant("posix_spawn failed");
  write_end.reset();
  pollfd ready = {read_end.get(), POLLIN, 0};
  char c = 0;
  while (::poll(&ready, 1, 20000) > 0 && ::read(read_end.get(), &c, 1) == 1 && c != '\n') {
    line_ += c;
  }
}

ClientProcess::~ClientProcess() {
  kill();
}

void ClientProcess::kill() {
  if (pid_ < 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

ErrorInfo error_in(const Json& reply) {
  if (reply.at("ok").get<bool>()) return {.message = "no error"};
  return error_from_map(reply.at("error"));
}

}  // namespace rollpack::bridge
