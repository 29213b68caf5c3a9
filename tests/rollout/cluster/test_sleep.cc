// Ranks that give their memory back and take it again under the dispatcher: nothing is lost, kept
// samples end with the bits of an undisturbed run, and what cannot be done meanwhile is refused.
#include <gtest/gtest.h>

#include <atomic>
#include <future>

#include "kernels/base/error.h"
#include "kernels/forwarding_backend.h"
#include "tests/error_text.h"
#include "tests/rollout/cluster/thread_ranks.h"
#include "tests/rollout/cluster/weight_chunk.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;
using rollpack::testing::error_text;

constexpr bridge::MemoryTags kAll{.weights = true, .kv_cache = true};

// A call's answer, with a deadline.
struct Slept {
  bridge::Answer<bridge::SleepState> callback() {
    return [promise = promise](bridge::Outcome error, bridge::SleepState state) {
      promise->set_value({std::move(error), state});
    };
  }
  std::pair<bridge::Outcome, bridge::SleepState> get() {
    auto future = promise->get_future();
    if (future.wait_for(30s) != std::future_status::ready) {
      ADD_FAILURE() << "no answer";
      return {};
    }
    return future.get();
  }
  std::shared_ptr<std::promise<std::pair<bridge::Outcome, bridge::SleepState>>> promise =
      std::make_shared<std::promise<std::pair<bridge::Outcome, bridge::SleepState>>>();
};

bridge::SleepState sleep(Dispatcher& dispatcher, int level,
                         bridge::InFlight mode = bridge::InFlight::kKeep) {
  Slept slept;
  dispatcher.sleep(level, mode, slept.callback());
  const auto [error, state] = slept.get();
  EXPECT_FALSE(error) << format_error(*error);
  return state;
}

bridge::SleepState wake_up(Dispatcher& dispatcher, bridge::MemoryTags tags = kAll) {
  Slept slept;
  dispatcher.wake_up(tags, slept.callback());
  const auto [error, state] = slept.get();
  EXPECT_FALSE(error) << format_error(*error);
  return state;
}

Config sixty_token_config() {
  Config config = tiny_config();
  config.rollout.response_length = 60;
  config.rollout.ignore_eos = true;
  return config;
}

std::map<KeepingSink::Name, bridge::Sample> undisturbed(int num_prompts) {
  ThreadRanks ranks(1, sixty_token_config());
  ranks.dispatcher().submit(numbered_prompts(num_prompts));
  EXPECT_TRUE(ranks.sink.wait_for(static_cast<size_t>(num_prompts) * 3));
  return ranks.sink.samples();
}

void expect_same(const std::map<KeepingSink::Name, bridge::Sample>& samples, int num_prompts) {
  const auto wanted = undisturbed(num_prompts);
  ASSERT_EQ(samples.size(), wanted.size());
  for (const auto& [name, sample] : wanted) expect_equal(sample, samples.at(name));
}

std::vector<bridge::PromptRequest> some_prompts(int first, int last) {
  std::vector<bridge::PromptRequest> prompts = numbered_prompts(last);
  prompts.erase(prompts.begin(), prompts.begin() + first);
  return prompts;
}

bridge::Outcome update(Dispatcher& dispatcher, int64_t version,
                       std::optional<int64_t> base = std::nullopt) {
  const Chunk chunk(tiny_tensors(2));
  bridge::Outcome error = begin(dispatcher, version, base);
  if (!error) error = stage(dispatcher, chunk);
  return error ? error : commit(dispatcher);
}

TEST(Sleep, KeptSamplesEndWithTheBitsOfAnUndisturbedRun) {
  ThreadRanks ranks(2, sixty_token_config());
  Dispatcher& dispatcher = ranks.dispatcher();
  dispatcher.submit(some_prompts(0, 16));
  ASSERT_TRUE(ranks.sink.wait_for(1));
  const bridge::SleepState asleep = sleep(dispatcher, 1);
  EXPECT_TRUE(asleep.asleep.weights && asleep.asleep.kv_cache);
  EXPECT_FALSE(asleep.needs_weights);
  EXPECT_GT(asleep.held_bytes, 0) << "level 1 keeps the weights on the CPU";
  EXPECT_EQ(stat(dispatcher, "is_asleep"), 1);
  const size_t num_ended = ranks.sink.samples().size();
  EXPECT_LT(num_ended, 48u);
  dispatcher.submit(some_prompts(16, 20));  // waits
  std::this_thread::sleep_for(50ms);
  EXPECT_EQ(ranks.sink.samples().size(), num_ended);
  EXPECT_TRUE(wake_up(dispatcher, {.weights = true}).asleep.kv_cache);
  std::this_thread::sleep_for(20ms);
  EXPECT_EQ(ranks.sink.samples().size(), num_ended);
  const bridge::SleepState awake = wake_up(dispatcher, {.kv_cache = true});
  EXPECT_TRUE(awake.is_awake());
  EXPECT_GT(awake.held_bytes, asleep.held_bytes);
  ASSERT_TRUE(ranks.sink.wait_for(60));
  expect_same(ranks.sink.samples(), 20);
}

TEST(Sleep, WaitsForStartedSamplesOrHandsThemBack) {
  ThreadRanks ranks(2, sixty_token_config());
  Dispatcher& dispatcher = ranks.dispatcher();
  dispatcher.submit(some_prompts(0, 12));
  ASSERT_TRUE(ranks.sink.wait_for(1));
  sleep(dispatcher, 1, bridge::InFlight::kWait);
  std::this_thread::sleep_for(20ms);
  const auto finished = ranks.sink.samples();
  for (const auto& [name, sample] : finished) {
    EXPECT_EQ(sample.finish_reason, bridge::FinishReason::kLength);
  }
  wake_up(dispatcher);
  ASSERT_TRUE(ranks.sink.wait_for(36));
  expect_same(ranks.sink.take_samples(), 12);

  dispatcher.submit(some_prompts(0, 12));
  ASSERT_TRUE(ranks.sink.wait_for(1));
  sleep(dispatcher, 1, bridge::InFlight::kAbort);
  int num_aborted = 0;
  for (const auto& [name, sample] : ranks.sink.samples()) {
    num_aborted += sample.finish_reason == bridge::FinishReason::kAbort;
  }
  EXPECT_GT(num_aborted, 0);
  wake_up(dispatcher);
  ASSERT_TRUE(ranks.sink.wait_for(36));
}

TEST(Sleep, Level2TakesAWholeUpdateBeforeAnythingIsGenerated) {
  ThreadRanks ranks(2, sixty_token_config());
  Dispatcher& dispatcher = ranks.dispatcher();
  dispatcher.submit(some_prompts(0, 8));
  ASSERT_TRUE(ranks.sink.wait_for(1));
  EXPECT_TRUE(sleep(dispatcher, 2).needs_weights);
  EXPECT_EQ(error_text([&] { dispatcher.submit(some_prompts(8, 9)); }),
            "failed_precondition: weights = dropped by sleep(level=2): expected a whole "
            "update_weights() first; wake_up(tags=[\"weights\"]), then send all tensors");
  EXPECT_EQ(format_error(*update(dispatcher, 1)),
            "update_weights = begin of version 1 while the weights sleep: expected "
            "wake_up(tags=[\"weights\"]) first");
  wake_up(dispatcher, {.weights = true});
  EXPECT_EQ(format_error(*update(dispatcher, 1, 0)),
            "base_version = 0: expected none after sleep(level=2); the weights were dropped: send "
            "all tensors");
  const size_t num_ended = ranks.sink.samples().size();
  ASSERT_FALSE(update(dispatcher, 1));
  EXPECT_FALSE(dispatcher.sleep_state().needs_weights);
  EXPECT_FALSE(dispatcher.sleep_state().is_awake());
  dispatcher.submit(some_prompts(8, 10));  // waits for its pages
  std::this_thread::sleep_for(20ms);
  EXPECT_EQ(ranks.sink.samples().size(), num_ended);
  wake_up(dispatcher, {.kv_cache = true});
  ASSERT_TRUE(ranks.sink.wait_for(30));
  int num_spanning = 0;
  for (const auto& [name, sample] : ranks.sink.samples()) {
    num_spanning += sample.weight_versions.size() == 2;
    if (name.first == "p9") {
      EXPECT_EQ(sample.weight_versions.front().version, 1);
    }
  }
  EXPECT_GT(num_spanning, 0) << "kept samples go on under the new weights";
}

TEST(Sleep, WithWeightsToComeItIsAwakeAndRefusesToGenerate) {
  ThreadRanks ranks(1);
  Dispatcher& dispatcher = ranks.dispatcher();
  sleep(dispatcher, 2);
  const bridge::SleepState state = wake_up(dispatcher);
  EXPECT_FALSE(state.asleep.any());
  EXPECT_FALSE(state.is_awake());
  EXPECT_EQ(error_text([&] { dispatcher.submit(numbered_prompts(1)); }),
            "failed_precondition: weights = dropped by sleep(level=2): expected a whole "
            "update_weights() first; send all tensors");
  ASSERT_FALSE(update(dispatcher, 1));
  dispatcher.submit(numbered_prompts(1));
  EXPECT_TRUE(ranks.sink.wait_for(3));
}

TEST(Sleep, ScoresAreRefusedAndNamesSay) {
  ThreadRanks ranks(1);
  sleep(ranks.dispatcher(), 1);
  std::promise<bridge::Outcome> scored;
  ranks.dispatcher().score({{.input_ids = {1}, .response_ids = {2}}},
                           [&](bridge::Outcome error, auto) { scored.set_value(error); });
  EXPECT_EQ(format_error(*scored.get_future().get()),
            "score = while asleep: expected wake_up() first");
  Slept slept;
  ranks.dispatcher().sleep(3, bridge::InFlight::kKeep, slept.callback());
  EXPECT_EQ(format_error(*slept.get().first), "level = 3: expected 1 or 2");
}

TEST(Sleep, IsRefusedWhileWeightsCome) {
  ThreadRanks ranks(2);
  Dispatcher& dispatcher = ranks.dispatcher();
  ASSERT_FALSE(begin(dispatcher, 4));
  Slept slept;
  dispatcher.sleep(2, bridge::InFlight::kKeep, slept.callback());
  EXPECT_EQ(format_error(*slept.get().first),
            "sleep = while weights of version 4 come: expected the end of their update first");
  EXPECT_TRUE(dispatcher.sleep_state().is_awake());
  dispatcher.cancel_weights();
  EXPECT_TRUE(sleep(dispatcher, 2).needs_weights);
}

// A trainer that is gone has left the first; the second is its successor's.
TEST(Sleep, CallsAreCarriedOutOneAfterTheOther) {
  ThreadRanks ranks(2, sixty_token_config());
  Dispatcher& dispatcher = ranks.dispatcher();
  dispatcher.submit(some_prompts(0, 8));
  ASSERT_TRUE(ranks.sink.wait_for(1));
  Slept first, second, third;
  dispatcher.sleep(1, bridge::InFlight::kWait, first.callback());
  dispatcher.wake_up(kAll, second.callback());
  dispatcher.sleep(1, bridge::InFlight::kKeep, third.callback());
  EXPECT_TRUE(first.get().second.asleep.kv_cache);
  EXPECT_TRUE(second.get().second.is_awake());
  EXPECT_TRUE(third.get().second.asleep.kv_cache);
  wake_up(dispatcher);
  ASSERT_TRUE(ranks.sink.wait_for(24));
  expect_same(ranks.sink.samples(), 8);
}

TEST(Sleep, PauseAndSleepDoNotUndoEachOther) {
  ThreadRanks ranks(2);
  Dispatcher& dispatcher = ranks.dispatcher();
  Waiter paused;
  dispatcher.pause(bridge::InFlight::kKeep, paused.callback());
  ASSERT_FALSE(paused.wait());
  sleep(dispatcher, 1, bridge::InFlight::kWait);
  dispatcher.submit(numbered_prompts(2));
  wake_up(dispatcher);
  std::this_thread::sleep_for(20ms);
  EXPECT_TRUE(ranks.sink.samples().empty()) << "it is paused yet";
  sleep(dispatcher, 1);
  dispatcher.resume();
  std::this_thread::sleep_for(20ms);
  EXPECT_TRUE(ranks.sink.samples().empty()) << "it sleeps yet";
  wake_up(dispatcher);
  EXPECT_TRUE(ranks.sink.wait_for(6));
}

TEST(Sleep, ARankThatIsLostAsleepIsReplacedAfterwardsAndItsWorkBlamesNobody) {
  Clock clock;
  ThreadRanks ranks(3, sixty_token_config(), clock.recovery());
  Dispatcher& dispatcher = ranks.dispatcher();
  std::atomic<int> num_started = 0;
  dispatcher.set_replace([&](int) { ++num_started; });
  dispatcher.check_leases();
  dispatcher.submit(some_prompts(0, 20));
  ASSERT_TRUE(ranks.sink.wait_for(1));
  sleep(dispatcher, 1);
  for (int i = 0; i < 60; ++i) {
    clock.ms += 1000;
    dispatcher.check_leases();
  }
  EXPECT_EQ(stat(dispatcher, "num_worker_deaths"), 0) << "who sleeps owes nothing";
  for (const int rank : {1, 2}) {
    dispatcher.lose_worker(rank, {.code = ErrorCode::kUnavailable, .field = "rank"});
  }
  EXPECT_EQ(num_started, 0) << "nobody loads a model while the job sleeps";
  wake_up(dispatcher);
  EXPECT_EQ(num_started, 2);
  ASSERT_TRUE(ranks.sink.wait_for(60));
  expect_same(ranks.sink.samples(), 20);
  EXPECT_EQ(stat(dispatcher, "num_groups_convicted"), 0);
}

TEST(Sleep, ARankThatIsLostWhileItFallsAsleepKeepsNobodyWaiting) {
  ThreadRanks ranks(2, sixty_token_config(), {.is_on = true});
  Dispatcher& dispatcher = ranks.dispatcher();
  dispatcher.submit(some_prompts(0, 8));
  ASSERT_TRUE(ranks.sink.wait_for(1));
  Slept slept;
  dispatcher.sleep(1, bridge::InFlight::kWait, slept.callback());
  dispatcher.lose_worker(1, {.code = ErrorCode::kUnavailable, .field = "rank 1"});
  EXPECT_FALSE(slept.get().first);
  wake_up(dispatcher);
  ASSERT_TRUE(ranks.sink.wait_for(24));
  expect_same(ranks.sink.samples(), 8);
}

// Fails to wake up with a code, `num_failures` times.
class SleepyBackend final : public kernels::ForwardingBackend {
 public:
  SleepyBackend(std::unique_ptr<kernels::Backend> inner, ErrorCode code, int num_failures)
      : ForwardingBackend(std::move(inner)), code_(code), num_failures_(num_failures) {}
  ~SleepyBackend() override { inner().set_program(nullptr); }
  void wake_up(kernels::MemoryTags tags) override {
    if (num_failures_-- > 0) throw Error({.code = code_, .field = "device memory"});
    inner().wake_up(tags);
  }

 private:
  const ErrorCode code_;
  int num_failures_;
};

// Two ranks, of which the second does not wake up well.
ThreadRanks ranks_with_a_sleepy_one(ErrorCode code) {
  return ThreadRanks(2,
                     [code](int rank) {
                       const Config config = sixty_token_config();
                       if (rank == 0) return tiny_replica(config);
                       auto backend =
                           configured_backend(config, tiny_model_config(), ReplicaOptions{});
                       auto replica = std::make_unique<Replica>(
                           config, tiny_model_config(),
                           std::make_unique<SleepyBackend>(std::move(backend), code, 1));
                       load_tensors(*replica, tiny_tensors(1));
                       return replica;
                     },
                     {.is_on = true});
}

TEST(Sleep, ARankThatIsBrokenWhenItWakesUpIsGivenUpAndTheOthersAreAwake) {
  ThreadRanks ranks = ranks_with_a_sleepy_one(ErrorCode::kUnavailable);
  Dispatcher& dispatcher = ranks.dispatcher();
  dispatcher.submit(some_prompts(0, 8));
  ASSERT_TRUE(ranks.sink.wait_for(1));
  sleep(dispatcher, 1);
  EXPECT_TRUE(wake_up(dispatcher).is_awake());
  ASSERT_TRUE(ranks.sink.wait_for(24));
  expect_same(ranks.sink.samples(), 8);
  EXPECT_EQ(stat(dispatcher, "num_worker_deaths"), 1);
}

TEST(Sleep, WhereARankFindsNoRoomAllSleepOnUntilTheNextCall) {
  ThreadRanks ranks = ranks_with_a_sleepy_one(ErrorCode::kResourceExhausted);
  Dispatcher& dispatcher = ranks.dispatcher();
  dispatcher.submit(some_prompts(0, 8));
  ASSERT_TRUE(ranks.sink.wait_for(1));
  sleep(dispatcher, 1);
  Slept slept;
  dispatcher.wake_up(kAll, slept.callback());
  const auto [error, state] = slept.get();
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code, ErrorCode::kResourceExhausted);
  EXPECT_FALSE(state.is_awake());
  EXPECT_TRUE(wake_up(dispatcher).is_awake());
  ASSERT_TRUE(ranks.sink.wait_for(24));
  expect_same(ranks.sink.samples(), 8);
  EXPECT_EQ(stat(dispatcher, "num_worker_deaths"), 0);
}

}  // namespace
}  // namespace rollpack::rollout
