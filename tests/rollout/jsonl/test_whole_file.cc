#include "rollout/jsonl/whole_file.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <filesystem>
#include <string>
#include <thread>

#include "tests/error_text.h"
#include "tests/rollout/temporary_folder.h"

namespace rollpack::rollout {
namespace {

namespace fs = std::filesystem;
using testing::error_text;
using testing::TemporaryFolder;

size_t num_entries(const TemporaryFolder& folder) {
  return static_cast<size_t>(
      std::distance(fs::directory_iterator(folder.path()), fs::directory_iterator()));
}

TEST(WholeFile, AppearsOnCommit) {
  const TemporaryFolder folder;
  const std::string long_line(300000, 'x');
  {
    WholeFile file(folder.file("out.jsonl"));
    file.write("a\n");
    file.write(long_line);
    EXPECT_FALSE(fs::exists(folder.file("out.jsonl")));
    file.commit();
  }
  EXPECT_EQ(folder.read("out.jsonl"), "a\n" + long_line);
  EXPECT_EQ(num_entries(folder), 1u);
}

TEST(WholeFile, WithoutCommitTheOldFileStaysAndNoTemporaryDoes) {
  const TemporaryFolder folder;
  folder.write("out.jsonl", "old");
  {
    WholeFile file(folder.file("out.jsonl"));
    file.write(std::string(1000000, 'n'));
  }
  EXPECT_EQ(folder.read("out.jsonl"), "old");
  EXPECT_EQ(num_entries(folder), 1u);
}

TEST(WholeFile, TwoWritersDoNotShareATemporary) {
  const TemporaryFolder folder;
  WholeFile first(folder.file("out")), second(folder.file("out"));
  first.write("first");
  second.write("second");
  first.commit();
  second.commit();
  EXPECT_EQ(folder.read("out"), "second");
}

TEST(WholeFile, ALinkStaysALink) {
  const TemporaryFolder folder;
  folder.write("target", "old");
  fs::create_symlink("target", folder.file("link"));
  WholeFile file(folder.file("link"));
  file.write("new");
  file.commit();
  EXPECT_TRUE(fs::is_symlink(folder.file("link")));
  EXPECT_EQ(folder.read("target"), "new");
}

TEST(WholeFile, HonoursTheUmask) {
  const TemporaryFolder folder;
  const mode_t old_mask = ::umask(027);
  WholeFile file(folder.file("out"));
  file.commit();
  ::umask(old_mask);
  struct stat status = {};
  ASSERT_EQ(::stat(folder.file("out").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0640u);
}

TEST(WholeFile, WritesToAPipeDirectly) {
  const TemporaryFolder folder;
  ASSERT_EQ(::mkfifo(folder.file("fifo").c_str(), 0600), 0);
  std::string got;
  std::thread reader([&] { got = folder.read("fifo"); });
  {
    WholeFile file(folder.file("fifo"));
    file.write("line\n");
    file.commit();
  }
  reader.join();
  EXPECT_EQ(got, "line\n");
}

TEST(WholeFile, StandardOutputIsWrittenDirectly) {
  for (const char* path : {"-", "/dev/stdout"}) {
    ::testing::internal::CaptureStdout();
    WholeFile file(path);
    file.write("line\n");
    file.commit();
    EXPECT_EQ(::testing::internal::GetCapturedStdout(), "line\n");
  }
}

TEST(WholeFile, AFolderAndAMissingFolderAreNamedBeforeAnyWork) {
  const TemporaryFolder folder;
  EXPECT_EQ(
      error_text([&] { WholeFile file(folder.path()); }),
      "invalid_argument: --output = " + folder.path() + ": expected a file; this is a folder");
  EXPECT_EQ(error_text([&] { WholeFile file(folder.file("no/out")); }),
            "not_found: --output = " + folder.file("no/out") +
                ": opening it failed: No such file or directory");
}

TEST(WholeFile, AFullDiskIsAnErrorAndLeavesNothing) {
  const TemporaryFolder folder;
  struct rlimit old_limit = {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  const struct rlimit small = {.rlim_cur = 1000, .rlim_max = old_limit.rlim_max};
  const auto old_handler = ::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string got = error_text([&] {
    WholeFile file(folder.file("out"));
    file.write(std::string(5000, 'x'));
    file.commit();
  });
  ::setrlimit(RLIMIT_FSIZE, &old_limit);
  ::signal(SIGXFSZ, old_handler);
  EXPECT_EQ(got, "resource_exhausted: --output = " + folder.file("out") +
                     ": writing it failed: File too large");
  EXPECT_EQ(num_entries(folder), 0u);
}

}  // namespace
}  // namespace rollpack::rollout
