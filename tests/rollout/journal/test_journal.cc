// The journal behind its thread, and on a real file: one sync for many, nobody waits, one job.
#include "rollout/journal/journal.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <future>
#include <thread>

#include <sys/resource.h>

#include "kernels/base/error.h"
#include "tests/error_text.h"
#include "tests/rollout/journal/made_records.h"
#include "tests/rollout/journal/memory_storage.h"

namespace rollpack::rollout {
namespace {

using rollpack::testing::error_of;
using testing::Disk;
using testing::made_batch;
using testing::made_group;
using testing::MemoryStorage;

bridge::Outcome wait_until_durable(Journal& journal) {
  std::promise<bridge::Outcome> told;
  journal.when_durable([&](bridge::Outcome outcome) { told.set_value(std::move(outcome)); });
  return told.get_future().get();
}

std::vector<AcceptedGroup> one_group(int64_t request) {
  return {made_group(request, 0, 2)};
}

class Folder {
 public:
  Folder() {
    std::string name = ::testing::TempDir() + "journal-XXXXXX";
    path = ::mkdtemp(name.data());
  }
  ~Folder() {
    const std::string remove = "rm -rf " + path;
    if (std::system(remove.c_str()) != 0) ADD_FAILURE() << remove;
  }
  std::string path;
};

TEST(Journal, DurableMeansThatAnotherReaderFindsIt) {
  const Folder folder;
  const std::string path = folder.path + "/sub/journal";
  std::string instance;
  {
    const auto journal = Journal::open(path, "cpu");
    instance = journal->restored_delivery().instance;
    for (int64_t request = 0; request < 100; ++request) {
      journal->accepted(request, one_group(request));
    }
    journal->formed({made_batch(1, 3, 0, 2)});
    journal->aborted(7);
    journal->switched(5);
    EXPECT_FALSE(wait_until_durable(*journal));
  }
  struct stat status = {};
  ASSERT_EQ(::stat(path.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0600u);
  const auto journal = Journal::open(path, "cpu");
  EXPECT_EQ(journal->restored_requests().groups.size(), 100u);
  EXPECT_EQ(journal->restored_requests().weight_version, 5);
  EXPECT_TRUE(journal->restored_requests().groups[7].is_aborted);
  EXPECT_EQ(journal->restored_delivery().batches.size(), 1u);
  EXPECT_EQ(journal->restored_delivery().instance, instance);
}

TEST(Journal, NothingUnderWayIsDurableAtOnce) {
  const auto disk = std::make_shared<Disk>();
  Journal journal(JournalLog(std::make_unique<MemoryStorage>(disk), "cpu", "i"));
  bool is_told = false;
  journal.when_durable([&](const bridge::Outcome&) { is_told = true; });
  EXPECT_TRUE(is_told);
}

TEST(Journal, ManyWritersShareTheirSyncs) {
  const Folder folder;
  const auto journal = Journal::open(folder.path + "/journal", "cpu");
  std::atomic<int64_t> next = 0;
  std::atomic<int> num_durable = 0;
  std::vector<std::thread> writers;
  for (int t = 0; t < 4; ++t) {
    writers.emplace_back([&] {
      for (int i = 0; i < 250; ++i) {
        const int64_t request = next++;
        journal->accepted(request, one_group(request));
        journal->when_durable([&](const bridge::Outcome& outcome) {
          EXPECT_FALSE(outcome);
          ++num_durable;
        });
      }
    });
  }
  for (std::thread& writer : writers) writer.join();
  EXPECT_FALSE(wait_until_durable(*journal));
  EXPECT_EQ(num_durable, 1000);
}

TEST(Journal, AFailedSyncIsTheEndAndIsNotTriedAgain) {
  const auto disk = std::make_shared<Disk>();
  Journal journal(JournalLog(std::make_unique<MemoryStorage>(disk), "cpu", "i"));
  std::promise<ErrorInfo> failed;
  journal.set_on_failure([&](ErrorInfo error) { failed.set_value(std::move(error)); });
  disk->sync_fails = true;
  journal.accepted(0, one_group(0));
  const bridge::Outcome outcome = wait_until_durable(journal);
  ASSERT_TRUE(outcome);
  EXPECT_EQ(outcome->code, ErrorCode::kUnavailable);
  EXPECT_EQ(outcome->field, "cluster.journal");
  EXPECT_EQ(failed.get_future().get().code, ErrorCode::kUnavailable);
  disk->sync_fails = false;  // the next one would succeed, and would say nothing of the first
  journal.accepted(1, one_group(1));
  EXPECT_TRUE(wait_until_durable(journal)) << "nothing is durable from then on";
  EXPECT_EQ(disk->num_calls_after_failure, 0);
}

TEST(Journal, AFullDiskIsNamed) {
  const Folder folder;
  const std::string path = folder.path + "/journal";
  const auto journal = Journal::open(path, "cpu");
  rlimit before = {};
  ::getrlimit(RLIMIT_FSIZE, &before);
  ::signal(SIGXFSZ, SIG_IGN);
  rlimit limit = before;
  limit.rlim_cur = 1000;
  ::setrlimit(RLIMIT_FSIZE, &limit);
  for (int64_t request = 0; request < 10; ++request) {
    journal->accepted(request, one_group(request));
  }
  const bridge::Outcome outcome = wait_until_durable(*journal);
  ::setrlimit(RLIMIT_FSIZE, &before);
  ASSERT_TRUE(outcome);
  EXPECT_EQ(outcome->code, ErrorCode::kResourceExhausted);
  EXPECT_EQ(outcome->value, path);
}

TEST(Journal, TwoJobsCannotHaveOne) {
  const Folder folder;
  const std::string path = folder.path + "/journal";
  auto journal = Journal::open(path, "cpu");
  // Also not once the file was put in place anew.
  journal->accepted(0, one_group(0));
  EXPECT_FALSE(wait_until_durable(*journal));
  const ErrorInfo error = error_of([&] { Journal::open(path, "cpu"); });
  EXPECT_EQ(error.code, ErrorCode::kFailedPrecondition);
  EXPECT_EQ(error.value, path);
  journal.reset();
  EXPECT_EQ(Journal::open(path, "cpu")->restored_requests().groups.size(), 1u);
}

TEST(Journal, WhatIsNoJournalIsLeftAsItIs) {
  const Folder folder;
  const std::string path = folder.path + "/notes.txt";
  std::ofstream(path) << "dear diary";
  EXPECT_EQ(error_of([&] { Journal::open(path, "cpu"); }).code, ErrorCode::kDataLoss);
  std::string text;
  std::getline(std::ifstream(path), text);
  EXPECT_EQ(text, "dear diary");
  EXPECT_EQ(error_of([&] { Journal::open(folder.path, "cpu"); }).code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(error_of([&] { Journal::open("/proc/none/journal", "cpu"); }).field, "cluster.journal");
}

TEST(Journal, AHalfWrittenNewFileOfACrashDoesNotMatter) {
  const Folder folder;
  const std::string path = folder.path + "/journal";
  Journal::open(path, "cpu")->accepted(0, one_group(0));
  std::ofstream(path + ".new") << "half of someth";
  EXPECT_EQ(Journal::open(path, "cpu")->restored_requests().groups.size(), 1u);
  EXPECT_NE(::access((path + ".new").c_str(), F_OK), 0);
}

}  // namespace
}  // namespace rollpack::rollout
