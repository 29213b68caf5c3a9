// The order of phases, the memory they bring, and what a refusal or a lost client leaves behind.
#include "trainer_bridge/weight_inbox/weight_inbox.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/checksum.h"
#include "tests/trainer_bridge/server/fake_service.h"
#include "tests/trainer_bridge/wire/sockets.h"
#include "trainer_bridge/shared_memory/peer_memory.h"

namespace rollpack::bridge {
namespace {

constexpr uint64_t kAnna = 1, kBerta = 2;

struct NoSink final : SampleSink {
  void commit(Sample) override {}
  void fail(FailedSample) override {}
};

// One sealed memfd that holds the named tensors of the fake model, all ones.
struct Chunk {
  ChunkManifest manifest;
  OwnedFd fd;
};

Chunk make_chunk(const std::vector<std::string>& names, int seals = kPeerSeals) {
  Chunk chunk;
  std::string memory;
  for (const std::string& name : names) {
    TensorEntry tensor{.name = name, .shape = fake_tensors().at(name)};
    int64_t count = 1;
    for (const int64_t dim : tensor.shape) count *= dim;
    const std::vector<float> ones(static_cast<size_t>(count), 1.0f);
    const std::string bytes(reinterpret_cast<const char*>(ones.data()), 4 * ones.size());
    tensor.offset = static_cast<int64_t>(memory.size());
    tensor.bytes = static_cast<int64_t>(bytes.size());
    tensor.crc32 = crc32_of(std::as_bytes(std::span(ones)));
    memory += bytes;
    chunk.manifest.tensors.push_back(tensor);
  }
  chunk.manifest.bytes = static_cast<int64_t>(memory.size());
  chunk.fd = make_memfd(memory);
  ::fcntl(chunk.fd.get(), F_ADD_SEALS, seals);
  return chunk;
}

const std::vector<std::string> kAllNames = {"lm_head.weight", "model.embed_tokens.weight",
                                            "model.norm.weight"};

// Answers for chunks when told to, as a replica does between two of its steps.
class SlowService final : public FakeService {
 public:
  using FakeService::FakeService;

  void stage_weights(WeightChunk chunk, OutcomeCallback done) override {
    held_.emplace_back(std::move(chunk), std::move(done));
  }
  size_t num_held() const { return held_.size(); }
  void answer_first() {
    auto [chunk, done] = std::move(held_.front());
    held_.pop_front();
    FakeService::stage_weights(std::move(chunk), std::move(done));
  }

 private:
  std::deque<std::pair<WeightChunk, OutcomeCallback>> held_;
};

template <class Service>
class InboxFixture : public ::testing::Test {
 protected:
  InboxFixture()
      : inbox(
            service, [this](WeightInbox::Task task) { background.push_back(std::move(task)); },
            [this](WeightInbox::Task task) { foreground.push_back(std::move(task)); }) {}

  // Records the outcome under `name`; ok is code "ok".
  OutcomeCallback into(const std::string& name) {
    return [this, name](const Outcome& outcome) {
      answers[name] = outcome ? *outcome : ErrorInfo{.message = "ok"};
    };
  }

  void run_all() {
    while (!background.empty() || !foreground.empty()) {
      std::deque<WeightInbox::Task>& tasks = foreground.empty() ? background : foreground;
      const WeightInbox::Task task = std::move(tasks.front());
      tasks.pop_front();
      task();
    }
  }

  void send(uint64_t client, int64_t version, const std::vector<std::string>& names,
            const std::string& answer = "chunk") {
    Chunk chunk = make_chunk(names);
    inbox.chunk(client, version, std::move(chunk.manifest), std::move(chunk.fd), into(answer));
  }

  // Tensors of this process, all ones.
  void lend(uint64_t client, int64_t version, const std::vector<std::string>& names,
            const std::string& answer = "chunk") {
    ChunkManifest manifest = make_chunk(names).manifest;
    for (TensorEntry& tensor : manifest.tensors) {
      tensor.address = reinterpret_cast<uint64_t>(ones.data());
    }
    inbox.lent_chunk(client, version, std::move(manifest),
                     std::make_shared<const PeerMemory>(::getpid()), into(answer));
  }

  ErrorInfo answer(const std::string& name) {
    run_all();
    return answers.contains(name) ? answers[name] : ErrorInfo{.message = "no answer"};
  }

  const std::vector<float> ones = std::vector<float>(4096, 1.0f);  // more than any tensor has
  NoSink sink;
  Service service{{}, sink};
  std::deque<WeightInbox::Task> background, foreground;
  WeightInbox inbox;
  std::map<std::string, ErrorInfo> answers;
};

using WeightInboxTest = InboxFixture<FakeService>;
using SlowInboxTest = InboxFixture<SlowService>;

TEST_F(WeightInboxTest, AnUpdateInManyChunksBecomesCurrent) {
  inbox.begin(kAnna, {.version = 5}, into("begin"));
  for (const std::string& name : kAllNames) send(kAnna, 5, {name}, name);
  inbox.commit(kAnna, 5, InFlight::kKeep, into("commit"));  // all sent ahead of their replies
  for (const std::string& name : kAllNames) EXPECT_EQ(answer(name).message, "ok");
  EXPECT_EQ(answer("commit").message, "ok");
  EXPECT_EQ(service.weight_version(), 5);
  EXPECT_FALSE(inbox.is_open());
}

TEST_F(WeightInboxTest, LentTensorsAreReadWhereTheyLieBesideThoseOfChunks) {
  inbox.begin(kAnna, {.version = 5}, into("begin"));
  lend(kAnna, 5, {kAllNames[0]}, "first");
  send(kAnna, 5, {kAllNames[1]}, "second");
  lend(kAnna, 5, {kAllNames[2]}, "third");
  inbox.commit(kAnna, 5, InFlight::kKeep, into("commit"));
  for (const char* name : {"first", "second", "third", "commit"}) {
    EXPECT_EQ(answer(name).message, "ok");
  }
  EXPECT_EQ(service.weight_version(), 5);
  ASSERT_EQ(service.lent_crc32().size(), 2u);
  for (const std::string& name : {kAllNames[0], kAllNames[2]}) {
    const ChunkManifest wanted = make_chunk({name}).manifest;
    EXPECT_EQ(service.lent_crc32().at(name), wanted.tensors[0].crc32) << name;
  }
}

TEST_F(WeightInboxTest, LentTensorsThatAreNotThereEndTheUpdate) {
  inbox.begin(kAnna, {.version = 1}, into("begin"));
  ChunkManifest manifest = make_chunk({kAllNames[0]}).manifest;
  manifest.tensors[0].address = 64;
  inbox.lent_chunk(kAnna, 1, std::move(manifest), std::make_shared<const PeerMemory>(::getpid()),
                   into("chunk"));
  EXPECT_EQ(answer("chunk").field, "address");
  EXPECT_FALSE(inbox.is_open());
  EXPECT_EQ(service.weight_version(), 0);
}

TEST_F(WeightInboxTest, LentTensorsAreRefusedAsOthersAre) {
  lend(kAnna, 1, kAllNames);
  EXPECT_EQ(answer("chunk").message, "no update is under way");
  inbox.begin(kAnna, {.version = 1}, into("begin"));
  lend(kBerta, 1, kAllNames);
  EXPECT_EQ(answer("chunk").message, "another client's update to version 1 is under way");
  send(kAnna, 1, {kAllNames[0]}, "first");
  lend(kAnna, 1, {kAllNames[0]}, "again");
  EXPECT_EQ(answer("first").message, "ok");
  EXPECT_EQ(answer("again").allowed, "each tensor once in an update");
  EXPECT_FALSE(inbox.is_open());
  EXPECT_EQ(service.num_cancelled_updates(), 1);
}

TEST(LentWeights, AServiceThatTakesNoneSaysSo) {
  NoSink sink;
  FakeService service({.takes_lent_weights = false}, sink);
  const WeightInbox::Runner now = [](const WeightInbox::Task& task) { task(); };
  WeightInbox inbox(service, now, now);
  Outcome answer;
  inbox.begin(kAnna, {.version = 1}, [](const Outcome& outcome) { ASSERT_FALSE(outcome); });
  inbox.lent_chunk(kAnna, 1, make_chunk(kAllNames).manifest,
                   std::make_shared<const PeerMemory>(::getpid()),
                   [&](const Outcome& outcome) { answer = outcome; });
  ASSERT_TRUE(answer);
  EXPECT_EQ(answer->code, ErrorCode::kUnsupported);
  EXPECT_EQ(answer->field, "lent");
  EXPECT_FALSE(inbox.is_open());
}

TEST_F(WeightInboxTest, PhasesOutOfOrderAreRefused) {
  send(kAnna, 1, kAllNames);
  EXPECT_EQ(answer("chunk").code, ErrorCode::kFailedPrecondition);
  EXPECT_EQ(answer("chunk").message, "no update is under way");
  inbox.commit(kAnna, 1, InFlight::kKeep, into("commit"));
  EXPECT_EQ(answer("commit").allowed, "begin first");
  EXPECT_EQ(error_of([&] { inbox.cancel(kAnna, 1); }).value, "cancel");
  inbox.begin(kAnna, {.version = 1}, into("begin"));
  inbox.begin(kAnna, {.version = 2}, into("twice"));
  EXPECT_EQ(answer("twice").message, "an update to version 1 is under way");
}

TEST_F(WeightInboxTest, VersionsMustRiseAndStayTheSameWithinAnUpdate) {
  for (const int64_t version : {-1, 0}) {
    inbox.begin(kAnna, {.version = version}, into("begin"));
    EXPECT_EQ(answer("begin").code, ErrorCode::kInvalidArgument);
    EXPECT_EQ(answer("begin").allowed, "above 0, the current version");
  }
  inbox.begin(kAnna, {.version = 3}, into("begin"));
  send(kAnna, 4, kAllNames);
  EXPECT_EQ(answer("chunk").allowed, "3, the version of the update under way");
  EXPECT_EQ(answer("chunk").value, "4");
  EXPECT_TRUE(inbox.is_open());
}

TEST_F(WeightInboxTest, AnotherClientsUpdateIsNotTouched) {
  inbox.begin(kAnna, {.version = 1}, into("begin"));
  inbox.begin(kBerta, {.version = 2}, into("second"));
  send(kBerta, 1, kAllNames);
  EXPECT_EQ(answer("second").message, "an update to version 1 is under way");
  EXPECT_EQ(answer("chunk").message, "another client's update to version 1 is under way");
  EXPECT_EQ(error_of([&] { inbox.cancel(kBerta, 1); }).code, ErrorCode::kFailedPrecondition);
  inbox.client_gone(kBerta);
  EXPECT_TRUE(inbox.is_open());
}

TEST_F(WeightInboxTest, AMissingTensorIsNamedAtCommitAndTheOldWeightsStay) {
  inbox.begin(kAnna, {.version = 1}, into("begin"));
  send(kAnna, 1, {"lm_head.weight", "model.norm.weight"});
  inbox.commit(kAnna, 1, InFlight::kKeep, into("commit"));
  EXPECT_EQ(answer("commit").field, "model.embed_tokens.weight");
  EXPECT_EQ(service.weight_version(), 0);
  EXPECT_FALSE(inbox.is_open());
}

TEST_F(WeightInboxTest, ATensorTwiceInAnUpdateIsRefused) {
  inbox.begin(kAnna, {.version = 1}, into("begin"));
  send(kAnna, 1, {"lm_head.weight"}, "first");
  send(kAnna, 1, {"model.norm.weight", "lm_head.weight"}, "second");
  EXPECT_EQ(answer("first").message, "ok");
  EXPECT_EQ(answer("second").value, "lm_head.weight");
  EXPECT_EQ(answer("second").allowed, "each tensor once in an update");
}

TEST_F(WeightInboxTest, AChangedByteNamesTheTensorAndEndsTheUpdate) {
  inbox.begin(kAnna, {.version = 1}, into("begin"));
  Chunk chunk = make_chunk(kAllNames);
  chunk.manifest.tensors[1].crc32 ^= 1;
  inbox.chunk(kAnna, 1, std::move(chunk.manifest), std::move(chunk.fd), into("chunk"));
  send(kAnna, 1, {"lm_head.weight"}, "next");
  EXPECT_EQ(answer("chunk").code, ErrorCode::kDataLoss);
  EXPECT_EQ(answer("chunk").field, "model.embed_tokens.weight");
  EXPECT_EQ(answer("next").message, "a phase before it was refused");
  EXPECT_EQ(service.num_cancelled_updates(), 1);
  EXPECT_FALSE(inbox.is_open());
  inbox.begin(kAnna, {.version = 1}, into("begin again"));
  EXPECT_EQ(answer("begin again").message, "ok");
}

TEST_F(WeightInboxTest, MemoryThatMayStillChangeOrIsNoMemfdIsRefused) {
  int pipe_fds[2] = {-1, -1};
  ASSERT_EQ(::pipe2(pipe_fds, O_CLOEXEC), 0);
  const OwnedFd write_end(pipe_fds[1]);
  struct BadFd {
    const char* what;
    OwnedFd fd;
    const char* said;
  };
  std::vector<BadFd> bad;
  bad.push_back({"pipe", OwnedFd(pipe_fds[0]), "memfd"});
  bad.push_back({"directory", OwnedFd(::open("/tmp", O_RDONLY | O_CLOEXEC)), "memfd"});
  bad.push_back({"device", OwnedFd(::open("/dev/zero", O_RDONLY | O_CLOEXEC)), "memfd"});
  bad.push_back({"unsealed", make_chunk(kAllNames, 0).fd, "SHRINK"});
  bad.push_back({"writable", make_chunk(kAllNames, F_SEAL_SHRINK | F_SEAL_GROW).fd, "WRITE"});
  bad.push_back({"shrinkable", make_chunk(kAllNames, F_SEAL_WRITE | F_SEAL_GROW).fd, "SHRINK"});
  bad.push_back({"too small", make_chunk({"lm_head.weight"}).fd, "bytes"});
  bad.push_back({"no descriptor", OwnedFd(), "memfd"});
  for (BadFd& entry : bad) {
    inbox.begin(kAnna, {.version = 1}, into("begin"));
    inbox.chunk(kAnna, 1, make_chunk(kAllNames).manifest, std::move(entry.fd), into("chunk"));
    const std::string text = format_error(answer("chunk"));
    EXPECT_NE(text.find(entry.said), std::string::npos) << entry.what << ": " << text;
    EXPECT_NE(text.find("update_weights chunk"), std::string::npos) << entry.what << ": " << text;
    EXPECT_FALSE(inbox.is_open()) << entry.what;
  }
}

TEST_F(WeightInboxTest, TooManyPhasesAheadWouldBlock) {
  inbox.begin(kAnna, {.version = 1}, into("begin"));
  for (int i = 0; i < 6; ++i) send(kAnna, 1, {"lm_head.weight"}, fmt::format("chunk {}", i));
  EXPECT_EQ(answers["chunk 5"].code, ErrorCode::kWouldBlock);
  EXPECT_FALSE(answers.contains("chunk 3"));
}

TEST_F(WeightInboxTest, AClientThatGoesCancelsItsUpdateAtAnyPhase) {
  for (int num_steps = 0; num_steps < 8; ++num_steps) {
    const int64_t cancelled = service.num_cancelled_updates();
    inbox.begin(kAnna, {.version = 1}, into("begin"));
    send(kAnna, 1, {"lm_head.weight"});
    send(kAnna, 1, {"model.norm.weight"}, "second");
    for (int step = 0; step < num_steps; ++step) {  // one task at a time, wherever that leads
      std::deque<WeightInbox::Task>& tasks = foreground.empty() ? background : foreground;
      if (tasks.empty()) break;
      const WeightInbox::Task task = std::move(tasks.front());
      tasks.pop_front();
      task();
    }
    inbox.client_gone(kAnna);
    EXPECT_FALSE(inbox.is_open());
    EXPECT_EQ(service.num_cancelled_updates(), cancelled + 1) << "after " << num_steps << " steps";
    inbox.begin(kBerta, {.version = 1}, into("next begin"));
    send(kBerta, 1, kAllNames, "next chunk");
    EXPECT_EQ(answer("next begin").message, "ok");
    EXPECT_EQ(answer("next chunk").message, "ok");
    inbox.cancel(kBerta, 1);
  }
  EXPECT_EQ(service.weight_version(), 0);
}

TEST_F(WeightInboxTest, ACommitThatHasBegunGoesThroughThoughItsClientGoes) {
  inbox.begin(kAnna, {.version = 1}, into("begin"));
  send(kAnna, 1, kAllNames);
  run_all();
  inbox.commit(kAnna, 1, InFlight::kKeep, into("commit"));
  inbox.client_gone(kAnna);
  EXPECT_EQ(answer("commit").message, "ok");
  EXPECT_EQ(service.weight_version(), 1);
  EXPECT_FALSE(inbox.is_open());
}

TEST_F(WeightInboxTest, DescriptorsAreClosedWhateverBecomesOfThem) {
  const size_t open_before = num_open_fds();
  inbox.begin(kAnna, {.version = 1}, into("begin"));
  send(kAnna, 1, {"lm_head.weight"});
  send(kAnna, 1, {"lm_head.weight"}, "twice");
  send(kBerta, 1, {"lm_head.weight"}, "foreign");
  run_all();
  inbox.client_gone(kAnna);
  EXPECT_EQ(num_open_fds(), open_before);
}

TEST_F(SlowInboxTest, ChunksReachTheServiceBeforeItHasAnsweredAndTheCommitAfter) {
  inbox.begin(kAnna, {.version = 1}, into("begin"));
  for (const std::string& name : kAllNames) send(kAnna, 1, {name}, name);
  inbox.commit(kAnna, 1, InFlight::kKeep, into("commit"));
  run_all();
  EXPECT_EQ(service.num_held(), 3u);
  for (const std::string& name : kAllNames) {
    EXPECT_EQ(answer(name).message, "no answer");
    EXPECT_EQ(answer("commit").message, "no answer");
    service.answer_first();
    EXPECT_EQ(answer(name).message, "ok");
  }
  EXPECT_EQ(answer("commit").message, "ok");
  EXPECT_EQ(service.weight_version(), 1);
}

TEST_F(SlowInboxTest, WhatTheServiceHoldsCountsAsAhead) {
  inbox.begin(kAnna, {.version = 1}, into("begin"));
  run_all();
  for (size_t i = 0; i < kMaxPhasesAhead; ++i) {
    send(kAnna, 1, {kAllNames[0]}, fmt::format("chunk {}", i));
    if (i == 0) run_all();
  }
  EXPECT_EQ(service.num_held(), 1u);
  send(kAnna, 1, {kAllNames[1]}, "too many");
  EXPECT_EQ(answers["too many"].code, ErrorCode::kWouldBlock);
}

TEST_F(SlowInboxTest, LentChunksThatTheServiceHoldsCountAsAheadToo) {
  inbox.begin(kAnna, {.version = 1}, into("begin"));
  for (const std::string& name : kAllNames) lend(kAnna, 1, {name}, name);
  inbox.commit(kAnna, 1, InFlight::kKeep, into("commit"));
  run_all();
  EXPECT_EQ(service.num_held(), 3u);
  EXPECT_EQ(answer("commit").message, "no answer");
  for (const std::string& name : kAllNames) {
    EXPECT_EQ(answer(name).message, "no answer");
    service.answer_first();
    EXPECT_EQ(answer(name).message, "ok");
  }
  EXPECT_EQ(answer("commit").message, "ok");
}

TEST_F(SlowInboxTest, WhatTheServiceHoldsOfAClientThatHasGoneDoesNotCountForTheNext) {
  inbox.begin(kAnna, {.version = 1}, into("begin"));
  for (const std::string& name : kAllNames) send(kAnna, 1, {name}, "of one who goes");
  run_all();
  ASSERT_EQ(service.num_held(), kAllNames.size());
  inbox.client_gone(kAnna);
  inbox.begin(kBerta, {.version = 1}, into("begin"));
  for (const std::string& name : kAllNames) {
    send(kBerta, 1, {name}, name);
    EXPECT_EQ(answer(name).message, "no answer");
  }
  for (size_t i = 0; i < 2 * kAllNames.size(); ++i) {
    service.answer_first();
    run_all();
  }
  EXPECT_EQ(answer("begin").message, "ok");
  for (const std::string& name : kAllNames) EXPECT_EQ(answer(name).message, "ok");
}

TEST_F(SlowInboxTest, ARefusalEndsTheUpdateOfChunksHeldBesideAndTheNextWaitsForThem) {
  inbox.begin(kAnna, {.version = 1}, into("begin"));
  Chunk unknown = make_chunk({"lm_head.weight"});
  unknown.manifest.tensors[0].name = "no.such.weight";
  inbox.chunk(kAnna, 1, std::move(unknown.manifest), std::move(unknown.fd), into("refused"));
  send(kAnna, 1, {"model.norm.weight"}, "beside");
  inbox.commit(kAnna, 1, InFlight::kKeep, into("commit"));
  run_all();
  ASSERT_EQ(service.num_held(), 2u);
  service.answer_first();
  EXPECT_EQ(answer("refused").field, "no.such.weight");
  EXPECT_EQ(answer("commit").message, "a phase before it was refused");
  inbox.begin(kAnna, {.version = 2}, into("next begin"));
  EXPECT_EQ(answer("next begin").message, "no answer");
  service.answer_first();
  EXPECT_EQ(answer("beside").message, "the update was cancelled meanwhile");
  EXPECT_EQ(answer("next begin").message, "ok");
  EXPECT_EQ(service.weight_version(), 0);
}

}  // namespace
}  // namespace rollpack::bridge
