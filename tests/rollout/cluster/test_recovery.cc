// Workers that are lost in the middle of their work, as threads: nothing lost, nothing twice, the
// same bits. Threads cannot be killed, so every lost one is a zombie whose results come late.
#include <gtest/gtest.h>

#include <atomic>
#include <future>

#include "kernels/base/error.h"
#include "tests/rollout/cluster/thread_ranks.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;

ErrorInfo gone(int rank) {
  return {
      .code = ErrorCode::kUnavailable, .field = "rank " + std::to_string(rank), .value = "gone"};
}

Config ninety_token_config() {
  Config config = tiny_config();
  config.rollout.response_length = 90;
  config.rollout.ignore_eos = true;
  return config;
}

void expect_same(std::map<KeepingSink::Name, bridge::Sample> samples,
                 std::map<KeepingSink::Name, bridge::Sample> undisturbed) {
  ASSERT_EQ(samples.size(), undisturbed.size());
  for (const auto& [name, sample] : undisturbed) {
    EXPECT_EQ(sample.response_ids, samples.at(name).response_ids);
    EXPECT_EQ(sample.logprobs, samples.at(name).logprobs);
    EXPECT_EQ(sample.support_logmass, samples.at(name).support_logmass);
    EXPECT_EQ(sample.weight_versions, samples.at(name).weight_versions);
  }
}

std::map<KeepingSink::Name, bridge::Sample> undisturbed(const Config& config, int num_prompts) {
  ThreadRanks ranks(1, config);
  ranks.dispatcher().submit(numbered_prompts(num_prompts));
  EXPECT_TRUE(ranks.sink.wait_for(num_prompts * 3));
  return ranks.sink.samples();
}

TEST(Recovery, GivesTheWorkOfALostRankToOthersWithTheSameBits) {
  ThreadRanks ranks(3, ninety_token_config(), {.is_on = true});
  ranks.dispatcher().submit(numbered_prompts(40));
  ASSERT_TRUE(ranks.sink.wait_for(1));
  ranks.dispatcher().lose_worker(1, gone(1));
  ASSERT_TRUE(ranks.sink.wait_for(120));
  expect_same(ranks.sink.samples(), undisturbed(ninety_token_config(), 40));
  EXPECT_EQ(stat(ranks.dispatcher(), "num_worker_deaths"), 1);
  EXPECT_EQ(stat(ranks.dispatcher(), "num_workers"), 2);
  EXPECT_GT(stat(ranks.dispatcher(), "num_groups_requeued"), 0);
  EXPECT_FALSE(ranks.dispatcher().health());
  for (int i = 0; i < 3000 && stat(ranks.dispatcher(), "num_late_samples_dropped") == 0; ++i) {
    std::this_thread::sleep_for(10ms);
  }
  EXPECT_GT(stat(ranks.dispatcher(), "num_late_samples_dropped"), 0) << "the zombies' samples";
  EXPECT_EQ(ranks.sink.samples().size(), 120u);
}

TEST(Recovery, GivesUpARankThatOwesAndShowsNoProgressForALease) {
  Clock clock;
  ThreadRanks ranks(2, ninety_token_config(), clock.recovery());
  Dispatcher& dispatcher = ranks.dispatcher();
  dispatcher.check_leases();
  const auto pass = [&](int64_t ms) {
    for (int64_t t = 0; t < ms; t += 1000) {
      clock.ms += 1000;
      dispatcher.check_leases();
    }
  };
  pass(60000);
  EXPECT_EQ(stat(dispatcher, "num_worker_deaths"), 0) << "an idle rank owes nothing";

  // Paused ranks keep their samples and say nothing, and owe nothing.
  std::promise<void> paused;
  dispatcher.pause(bridge::InFlight::kKeep, [&](bridge::Outcome) { paused.set_value(); });
  ASSERT_EQ(paused.get_future().wait_for(30s), std::future_status::ready);
  dispatcher.submit(numbered_prompts(12));
  std::promise<bridge::Outcome> scored;
  dispatcher.score(
      {{.input_ids = {1}, .response_ids = {2}}, {.input_ids = {3}, .response_ids = {4}}},
      [&](bridge::Outcome error, auto) { scored.set_value(std::move(error)); });
  pass(60000);
  EXPECT_EQ(stat(dispatcher, "num_worker_deaths"), 0);
  dispatcher.resume();
  std::future<bridge::Outcome> outcome = scored.get_future();
  ASSERT_EQ(outcome.wait_for(30s), std::future_status::ready);
  EXPECT_FALSE(outcome.get());
}

// Takes commands and never answers, as a stopped process does.
class StoppedLink : public WorkerLink {
 public:
  void send(Command) override { ++num_commands; }
  bool is_own_process() const override { return true; }
  void kill() override { ++num_kills; }
  std::atomic<int> num_commands = 0, num_kills = 0;
};

// A dispatcher over a worker that works and one that stands still once it has asked for work.
struct HalfStopped {
  explicit HalfStopped(const Config& config, Clock& clock)
      : replica(tiny_replica(config)),
        dispatcher(config, replica->model(), replica->limits(),
                   replica->backend().info().fingerprint, replica->backend().weights_hash(), false,
                   clock.recovery()),
        worker(std::make_shared<Worker>(
            *replica, [this](Event event) { dispatcher.handle(0, std::move(event)); })),
        stopped(std::make_shared<StoppedLink>()) {
    dispatcher.set_sink(sink);
    dispatcher.add_worker(worker);
    dispatcher.add_worker(stopped);
    worker->start();
    dispatcher.handle(1, WorkerReady{.fingerprint = replica->backend().info().fingerprint,
                                     .weights_hash = replica->backend().weights_hash()});
    dispatcher.handle(1, Pull{.num_samples = 6});
    dispatcher.check_leases();
  }
  ~HalfStopped() { worker->stop(); }

  KeepingSink sink;
  std::unique_ptr<Replica> replica;
  Dispatcher dispatcher;
  std::shared_ptr<Worker> worker;
  std::shared_ptr<StoppedLink> stopped;
};

TEST(Recovery, AStoppedRankCostsOneLeaseAndIsKilled) {
  Clock clock;
  HalfStopped ranks(tiny_config(), clock);
  ranks.dispatcher.submit(numbered_prompts(10));
  ASSERT_GT(ranks.stopped->num_commands, 0) << "it was given work";
  for (int i = 0; i < 10; ++i) {
    clock.ms += 1000;
    ranks.dispatcher.check_leases();
  }
  EXPECT_EQ(ranks.stopped->num_kills, 0);
  clock.ms += 1;
  ranks.dispatcher.check_leases();
  EXPECT_EQ(ranks.stopped->num_kills, 1);
  ASSERT_TRUE(ranks.sink.wait_for(30));
  expect_same(ranks.sink.samples(), undisturbed(tiny_config(), 10));
}

// Of another node. Keeps what it is told.
class RemoteLink : public WorkerLink {
 public:
  void send(Command command) override { commands.push_back(std::move(command)); }
  bool is_own_process() const override { return true; }
  int node() const override { return 1; }

  int num_groups() const {
    int count = 0;
    for (const Command& command : commands) {
      const auto* add = std::get_if<AddGroups>(&command);
      if (add != nullptr) count += static_cast<int>(add->groups.size());
    }
    return count;
  }
  std::vector<Command> commands;
};

TEST(Recovery, RanksBesideALostOneOfAnotherNodeMustAnswerBeforeTheyGetMore) {
  Clock clock;
  HalfStopped ranks(tiny_config(), clock);
  Dispatcher& dispatcher = ranks.dispatcher;
  std::vector<std::shared_ptr<RemoteLink>> links;
  for (int32_t worker = 2; worker < 5; ++worker) {
    links.push_back(std::make_shared<RemoteLink>());
    ASSERT_EQ(dispatcher.add_worker(links.back()), worker);
    dispatcher.handle(worker,
                      WorkerReady{.fingerprint = ranks.replica->backend().info().fingerprint});
    dispatcher.handle(worker, Pull{.num_samples = 3});
  }
  dispatcher.submit(numbered_prompts(9));
  for (const auto& link : links) ASSERT_EQ(link->num_groups(), 1);
  for (int32_t worker = 2; worker < 5; ++worker) {
    dispatcher.handle(worker, Pull{.num_samples = 300});
  }
  const std::vector<int> before = {links[0]->num_groups(), links[1]->num_groups(),
                                   links[2]->num_groups()};
  dispatcher.lose_worker(2, gone(2));
  // More than the one that works can take at once.
  std::vector<bridge::PromptRequest> more = numbered_prompts(200);
  for (bridge::PromptRequest& prompt : more) prompt.prompt_id->text += "-more";
  dispatcher.submit(std::move(more));
  EXPECT_EQ(links[1]->num_groups(), before[1]) << "nothing of the lost one's";
  EXPECT_EQ(links[2]->num_groups(), before[2]);
  ASSERT_TRUE(std::holds_alternative<Ping>(links[1]->commands.back()));
  ASSERT_TRUE(std::holds_alternative<Ping>(links[2]->commands.back()));
  dispatcher.handle(3, Ack{.ticket = std::get<Ping>(links[1]->commands.back()).ticket});
  EXPECT_GT(links[1]->num_groups(), before[1]) << "it is there";
  EXPECT_EQ(links[2]->num_groups(), before[2]);
  // The other one is found out by its lease, and what it had is made good as well.
  for (int i = 0; i < 11; ++i) {
    clock.ms += 1000;
    dispatcher.handle(3, StepProgress{});
    dispatcher.check_leases();
  }
  EXPECT_EQ(stat(dispatcher, "num_worker_deaths"), 3) << "and the one that stands still";
  EXPECT_EQ(stat(dispatcher, "num_groups_convicted"), 0);
}

TEST(Recovery, AStoppedRank0DoesNotGiveUpTheOthers) {
  Clock clock;
  HalfStopped ranks(tiny_config(), clock);
  ranks.dispatcher.submit(numbered_prompts(10));
  clock.ms += 60000;  // no check in between: this process stood still itself
  ranks.dispatcher.check_leases();
  EXPECT_EQ(ranks.stopped->num_kills, 0);
  for (int i = 0; i < 11; ++i) {
    clock.ms += 1000;
    ranks.dispatcher.check_leases();
  }
  EXPECT_EQ(ranks.stopped->num_kills, 1);
}

TEST(Recovery, ScoresOfALostRankAreAskedOfAnother) {
  Clock clock;
  HalfStopped ranks(tiny_config(), clock);
  std::vector<bridge::ScoreSequence> sequences(7);
  for (size_t i = 0; i < sequences.size(); ++i) {
    sequences[i] = {.id = {.text = std::to_string(i)}, .input_ids = {1, 2}, .response_ids = {3, 4}};
  }
  std::promise<std::vector<bridge::ScoredSequence>> scored;
  ranks.dispatcher.score(sequences, [&](bridge::Outcome error, auto results) {
    EXPECT_FALSE(error);
    scored.set_value(std::move(results));
  });
  ranks.dispatcher.lose_worker(1, gone(1));
  auto future = scored.get_future();
  ASSERT_EQ(future.wait_for(30s), std::future_status::ready);
  const auto results = future.get();
  for (size_t i = 0; i < sequences.size(); ++i) {
    EXPECT_EQ(results[i].id.text, std::to_string(i));
    EXPECT_EQ(results[i].logprobs, results[0].logprobs);
    EXPECT_EQ(results[i].logprobs.size(), 2u);
  }
}

TEST(Recovery, APauseEndsThoughARankIsLost) {
  Clock clock;
  HalfStopped ranks(tiny_config(), clock);
  std::promise<bridge::Outcome> paused;
  ranks.dispatcher.pause(bridge::InFlight::kKeep,
                         [&](bridge::Outcome error) { paused.set_value(std::move(error)); });
  ranks.dispatcher.lose_worker(1, gone(1));
  auto future = paused.get_future();
  ASSERT_EQ(future.wait_for(30s), std::future_status::ready);
  EXPECT_FALSE(future.get());
}

TEST(Recovery, AbortHandsBackWhatALostRankHeld) {
  Clock clock;
  HalfStopped ranks(tiny_config(), clock);
  ranks.dispatcher.submit(numbered_prompts(10));
  ranks.dispatcher.abort(std::nullopt);
  ranks.dispatcher.lose_worker(1, gone(1));
  ASSERT_TRUE(ranks.sink.wait_for(30));
  EXPECT_EQ(ranks.sink.samples().size(), 30u);
}

TEST(Recovery, EndsWhenNoWorkerIsLeft) {
  ThreadRanks ranks(2, ninety_token_config(), {.is_on = true});
  std::promise<void> ended;
  ranks.dispatcher().set_on_end([&] { ended.set_value(); });
  ranks.dispatcher().submit(numbered_prompts(20));
  ranks.dispatcher().lose_worker(1, gone(1));
  EXPECT_FALSE(ranks.dispatcher().health());
  ranks.dispatcher().lose_worker(0, gone(0));
  EXPECT_EQ(ended.get_future().wait_for(10s), std::future_status::ready);
  EXPECT_EQ(format_error(*ranks.dispatcher().health()),
            "workers = none left: the last one: rank 0 = gone");
}

}  // namespace
}  // namespace rollpack::rollout
