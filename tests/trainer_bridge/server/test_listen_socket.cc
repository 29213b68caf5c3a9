// Where the socket lies: modes, locks, what a dead server left, paths that cannot be.
#include "trainer_bridge/server/listen_socket.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>

#include "tests/trainer_bridge/server/server_fixture.h"
#include "tests/trainer_bridge/wire/sockets.h"

namespace rollpack::bridge {
namespace {

namespace fs = std::filesystem;

mode_t mode_of(const std::string& path) {
  struct stat status = {};
  return ::stat(path.c_str(), &status) == 0 ? status.st_mode & 0777u : 0;
}

TEST(ListenSocket, MakesAPrivateDirectoryAndSocketUnderAnyUmask) {
  for (const mode_t mask : {0u, 022u, 077u}) {
    const TemporaryFolder folder;
    const mode_t before = ::umask(mask);
    ListenSocket socket(folder / "new/deep/bridge.sock");
    socket.listen();
    EXPECT_EQ(::umask(before), mask);  // the process's own mask is as it was
    EXPECT_EQ(mode_of(folder / "new/deep"), 0700u);
    EXPECT_EQ(mode_of(socket.path()), 0600u);
    EXPECT_EQ(mode_of(socket.path() + ".lock"), 0600u);
  }
}

TEST(ListenSocket, LeavesNoFileBehind) {
  const TemporaryFolder folder;
  const std::string path = folder / "bridge.sock";
  {
    ListenSocket socket(path);
    socket.listen();
    EXPECT_TRUE(fs::exists(path));
  }
  EXPECT_FALSE(fs::exists(path));
  EXPECT_FALSE(fs::exists(path + ".lock"));
}

TEST(ListenSocket, ALiveOneKeepsItsPath) {
  const TemporaryFolder folder;
  const std::string path = folder / "bridge.sock";
  ListenSocket socket(path);
  socket.listen();
  const ErrorInfo error = error_of([&] { ListenSocket second(path); });
  EXPECT_EQ(error.code, ErrorCode::kFailedPrecondition);
  EXPECT_EQ(error.field, "bridge.socket");
  EXPECT_EQ(error.value, path);
  EXPECT_EQ(error.allowed, "a path that no live server has");
  EXPECT_EQ(error.message, "process " + std::to_string(::getpid()) + " has it");
  EXPECT_TRUE(fs::exists(path));
  EXPECT_TRUE(fs::exists(path + ".lock"));
}

TEST(ListenSocket, ReplacesWhatADeadOneLeft) {
  const TemporaryFolder folder;
  const std::string path = folder / "bridge.sock";
  fs::create_symlink("nowhere", path + ".old");
  {
    ListenSocket dead(path);
    dead.listen();
    fs::rename(path, path + ".old");  // survives the destructor, as after a SIGKILL
  }
  fs::rename(path + ".old", path);
  std::ofstream(path + ".lock") << "1";
  ListenSocket next(path);
  next.listen();
  EXPECT_TRUE(fs::is_socket(path));
}

TEST(ListenSocket, AFileOfAnotherKindIsNotRemoved) {
  const TemporaryFolder folder;
  const std::string path = folder / "bridge.sock";
  std::ofstream(path) << "precious";
  const ErrorInfo error = error_of([&] { ListenSocket(path).listen(); });
  EXPECT_EQ(error.allowed, "no file of another kind");
  EXPECT_TRUE(fs::is_regular_file(path));
}

TEST(ListenSocket, PathErrorNamesTheLimit) {
  const TemporaryFolder folder;
  for (const std::string& path :
       {std::string(), folder / std::string(108, 'x'), std::string("a\0b", 3)}) {
    const ErrorInfo error = error_of([&] { ListenSocket socket(path); });
    EXPECT_EQ(error.code, ErrorCode::kInvalidArgument);
    EXPECT_EQ(error.allowed, "1 to 107 bytes, as a socket's address holds");
  }
  const std::string longest = folder / "";
  ListenSocket socket(longest + std::string(kMaxSocketPathBytes - longest.size(), 'x'));
  socket.listen();
}

TEST(ListenSocket, ADirectoryThatCannotBeMadeIsSaid) {
  const TemporaryFolder folder;
  std::ofstream(folder / "file") << "x";
  const ErrorInfo error = error_of([&] { ListenSocket socket(folder / "file/bridge.sock"); });
  EXPECT_EQ(error.field, "bridge.socket");
  EXPECT_EQ(error.message.substr(0, 4), "open");
}

}  // namespace
}  // namespace rollpack::bridge
