// A running server over the fake service, in a directory of its own; and client processes that a
// test may kill.
#pragma once

#include <gtest/gtest.h>
#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/trainer_bridge/server/fake_service.h"
#include "tests/trainer_bridge/server/test_client.h"
#include "trainer_bridge/server/server.h"

namespace rollpack::bridge {

class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

class ServerTest : public ::testing::Test {
 protected:
  // `options` without a socket gets one in the folder.
  void start(ServerOptions options = {.slot_bytes = 1 << 16}, FakeOptions fake = {});
  TestClient connect() { return TestClient(path); }
  double stat(TestClient& client, const std::string& name);
  // Polls until `is_true`, 10 s at most.
  static void wait_until(const std::function<bool()>& is_true, const std::string& what);

  TemporaryFolder folder;
  std::string path = folder / "run/bridge.sock";
  std::unique_ptr<Server> server;
  std::unique_ptr<FakeService> service;

  void TearDown() override;
};

// bridge_client_process with `orders`, connected to the server at `path`.
class ClientProcess {
 public:
  ClientProcess(const std::string& path, const std::vector<std::string>& orders);
  ~ClientProcess();
  ClientProcess(const ClientProcess&) = delete;
  ClientProcess& operator=(const ClientProcess&) = delete;

  // The line it prints when it has done what it was told.
  const std::string& line() const { return line_; }
  // SIGKILL, and gone when this returns.
  void kill();

 private:
  pid_t pid_ = -1;
  std::string line_;
};

// The error of a reply that has one; code internal and the message "no error" otherwise.
ErrorInfo error_in(const Json& reply);

}  // namespace rollpack::bridge
