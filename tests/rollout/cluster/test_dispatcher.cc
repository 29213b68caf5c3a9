#include "rollout/cluster/dispatcher.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <future>

#include "kernels/base/error.h"
#include "tests/error_text.h"
#include "tests/rollout/cluster/thread_ranks.h"
#include "trainer_bridge/shared_memory/segment.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;
using rollpack::testing::error_text;

// A callback's outcome, with a deadline.
struct Waiter {
  std::promise<bridge::Outcome> promise;
  bridge::OutcomeCallback callback() {
    return [this](bridge::Outcome outcome) { promise.set_value(std::move(outcome)); };
  }
  bridge::Outcome wait() {
    auto future = promise.get_future();
    if (future.wait_for(30s) != std::future_status::ready) {
      return ErrorInfo{.code = ErrorCode::kDeadlineExceeded, .message = "no callback"};
    }
    return future.get();
  }
};

// Tensors in a sealed memfd, as the weight inbox hands them over.
struct Chunk {
  explicit Chunk(const std::vector<NamedTensor>& tensors) {
    const int fd = ::memfd_create("tiny weights", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int64_t bytes = 0;
    std::vector<int64_t> offsets;
    for (const NamedTensor& tensor : tensors) {
      offsets.push_back(bytes);
      EXPECT_EQ(::pwrite(fd, tensor.values.data(), tensor.bytes().size(), bytes),
                static_cast<ssize_t>(tensor.bytes().size()));
      bytes += static_cast<int64_t>(tensor.bytes().size());
    }
    ::fcntl(fd, F_ADD_SEALS, bridge::kPeerSeals);
    owner = bridge::OwnedFd(fd);
    segment.emplace(bridge::MappedSegment::map(fd, bytes, bridge::kPeerSeals, "test"));
    chunk = {.fd = fd, .mapping = segment->bytes()};
    for (size_t i = 0; i < tensors.size(); ++i) {
      chunk.tensors.push_back(
          {.name = tensors[i].name,
           .dtype = DType::kF32,
           .shape = tensors[i].shape,
           .bytes = segment->bytes().subspan(offsets[i], tensors[i].bytes().size())});
    }
  }
  bridge::OwnedFd owner;
  std::optional<bridge::MappedSegment> segment;
  bridge::WeightChunk chunk;
};

bridge::Outcome begin(Dispatcher& dispatcher, int64_t version,
                      std::optional<int64_t> base_version = std::nullopt) {
  Waiter waiter;
  dispatcher.begin_weights({version, base_version}, waiter.callback());
  return waiter.wait();
}

bridge::Outcome stage(Dispatcher& dispatcher, const Chunk& chunk) {
  Waiter waiter;
  dispatcher.stage_weights(chunk.chunk, waiter.callback());
  return waiter.wait();
}

bridge::Outcome commit(Dispatcher& dispatcher, bridge::InFlight mode = bridge::InFlight::kKeep) {
  Waiter waiter;
  dispatcher.commit_weights(mode, waiter.callback());
  return waiter.wait();
}

std::map<KeepingSink::Name, bridge::Sample> run(int num_ranks, int num_prompts) {
  ThreadRanks ranks(num_ranks);
  ranks.dispatcher().submit(numbered_prompts(num_prompts));
  EXPECT_TRUE(ranks.sink.wait_for(num_prompts * 3));
  return ranks.sink.samples();
}

void expect_equal(const bridge::Sample& a, const bridge::Sample& b) {
  EXPECT_EQ(a.response_ids, b.response_ids);
  EXPECT_EQ(a.logprobs, b.logprobs);
  EXPECT_EQ(a.scaled_logprobs, b.scaled_logprobs);
  EXPECT_EQ(a.finish_reason, b.finish_reason);
}

TEST(Dispatcher, GivesTheSameSamplesOnAnyNumberOfRanks) {
  const auto alone = run(1, 20);
  ASSERT_EQ(alone.size(), 60u);
  for (const int num_ranks : {2, 3}) {
    const auto shared = run(num_ranks, 20);
    ASSERT_EQ(shared.size(), alone.size());
    for (const auto& [name, sample] : alone) expect_equal(sample, shared.at(name));
  }
}

TEST(Dispatcher, UsesEveryRankForAFewGroups) {
  ThreadRanks ranks(3);
  ranks.dispatcher().submit(numbered_prompts(6));
  ASSERT_TRUE(ranks.sink.wait_for(18));
  // Their numbers follow within the statistics' interval.
  double num_samples = 0;
  for (int i = 0; i < 300 && num_samples < 18; ++i) {
    for (const auto& [name, value] : ranks.dispatcher().stats()) {
      if (name == "num_samples") num_samples = value;
    }
    std::this_thread::sleep_for(10ms);
  }
  EXPECT_EQ(num_samples, 18);
}

TEST(Dispatcher, AcceptsAllPromptsOfASubmitOrNone) {
  ThreadRanks ranks(1);
  auto prompts = numbered_prompts(3);
  prompts[2].input_ids = {5, 71};
  EXPECT_EQ(error_text([&] { ranks.dispatcher().submit(prompts); }),
            "invalid_argument: input_ids[1] = 71 (prompts[2]): expected token ids from 0 to 70");
  prompts[2].input_ids.assign(33, 1);
  EXPECT_EQ(error_text([&] { ranks.dispatcher().submit(prompts); }),
            "invalid_argument: input_ids = 33 tokens (prompts[2]): expected at most "
            "rollout.prompt_length = 32 tokens; raise rollout.prompt_length, or set "
            "rollout.prompt_overflow to skip or "
            "truncate_left");
  prompts[2].input_ids = {};
  EXPECT_EQ(error_text([&] { ranks.dispatcher().submit(prompts); }),
            "invalid_argument: input_ids = [] (prompts[2]): expected at least one token");
  prompts[2] = prompts[0];
  prompts[2].origin = "prompts[2]";
  EXPECT_EQ(error_text([&] { ranks.dispatcher().submit(prompts); }),
            "invalid_argument: prompt_id = p0 (prompts[2]): expected an id that no other live "
            "prompt has; prompts[0] has it too");
  EXPECT_EQ(ranks.dispatcher().abort(std::nullopt), 0) << "nothing was accepted";
}

TEST(Dispatcher, SkipsOrTruncatesPromptsThatAreTooLong) {
  for (const char* overflow : {"skip", "truncate_left"}) {
    Config config = tiny_config();
    config.rollout.prompt_overflow = overflow;
    ThreadRanks ranks(1, config);
    auto prompts = numbered_prompts(2);
    prompts[1].input_ids.assign(33, 4);
    prompts[1].input_ids[0] = 9;
    ranks.dispatcher().submit(prompts);
    ASSERT_TRUE(ranks.sink.wait_for(6));
    if (std::string(overflow) == "skip") {
      ASSERT_EQ(ranks.sink.failed().size(), 3u);
      EXPECT_EQ(ranks.sink.failed()[0].error.field, "input_ids");
    } else {
      EXPECT_EQ(*ranks.sink.samples().at({"p1", 0}).prompt_ids, std::vector<int32_t>(32, 4));
    }
  }
}

TEST(Dispatcher, AbortHandsBackEverySampleOnce) {
  Config config = tiny_config();
  config.rollout.response_length = 90;
  config.rollout.ignore_eos = true;
  ThreadRanks ranks(2, config);
  const int64_t id = ranks.dispatcher().submit(numbered_prompts(30));
  EXPECT_GT(ranks.dispatcher().abort(id), 0);
  ASSERT_TRUE(ranks.sink.wait_for(90));
  int num_aborted = 0;
  for (const auto& [name, sample] : ranks.sink.samples()) {
    num_aborted += sample.finish_reason == bridge::FinishReason::kAbort;
    EXPECT_EQ(sample.logprobs.size(), sample.response_ids.size());
  }
  EXPECT_GT(num_aborted, 0);
  EXPECT_EQ(ranks.dispatcher().abort(id), 0);
}

TEST(Dispatcher, SwitchesWeightsOnAllRanksAndStampsTheVersion) {
  ThreadRanks ranks(2);
  const Chunk chunk(tiny_tensors(2));
  ASSERT_FALSE(begin(ranks.dispatcher(), 5));
  ASSERT_FALSE(stage(ranks.dispatcher(), chunk));
  ASSERT_FALSE(commit(ranks.dispatcher()));
  EXPECT_EQ(ranks.dispatcher().weight_version(), 5);
  ranks.dispatcher().submit(numbered_prompts(6));
  ASSERT_TRUE(ranks.sink.wait_for(18));
  const auto before = run(1, 6);
  int num_changed = 0;
  for (const auto& [name, sample] : ranks.sink.samples()) {
    EXPECT_EQ(sample.weight_versions, (std::vector<bridge::VersionSpan>{{0, 5}}));
    num_changed += sample.response_ids != before.at(name).response_ids;
  }
  EXPECT_GT(num_changed, 0);
}

// Tensors [first, last) of the tiny model in seed 2's values.
bridge::Outcome update_some(Dispatcher& dispatcher, int64_t version, size_t first, size_t last) {
  const auto tensors = tiny_tensors(2);
  const Chunk chunk({tensors.begin() + static_cast<ptrdiff_t>(first),
                     tensors.begin() + static_cast<ptrdiff_t>(last)});
  bridge::Outcome error = begin(dispatcher, version, version - 1);
  if (!error) error = stage(dispatcher, chunk);
  return error ? error : commit(dispatcher);
}

TEST(Dispatcher, PartialUpdatesOneAfterTheOtherGiveTheBitsOfAWholeOne) {
  ThreadRanks ranks(2), whole(2);
  const size_t num_tensors = tiny_tensors(2).size();
  ASSERT_FALSE(update_some(ranks.dispatcher(), 1, 0, 3));
  ranks.dispatcher().submit(numbered_prompts(6));
  ASSERT_TRUE(ranks.sink.wait_for(18));
  ASSERT_FALSE(update_some(ranks.dispatcher(), 2, 3, num_tensors - 1));
  ASSERT_FALSE(update_some(ranks.dispatcher(), 3, num_tensors - 1, num_tensors));
  const Chunk chunk(tiny_tensors(2));
  ASSERT_FALSE(begin(whole.dispatcher(), 5));
  ASSERT_FALSE(stage(whole.dispatcher(), chunk));
  ASSERT_FALSE(commit(whole.dispatcher()));
  const auto half_way = ranks.sink.take_samples();
  ranks.dispatcher().submit(numbered_prompts(6));
  whole.dispatcher().submit(numbered_prompts(6));
  ASSERT_TRUE(ranks.sink.wait_for(18));
  ASSERT_TRUE(whole.sink.wait_for(18));
  const auto updated_samples = ranks.sink.samples();
  int num_changed = 0;
  for (const auto& [name, sample] : whole.sink.samples()) {
    const bridge::Sample& updated = updated_samples.at(name);
    EXPECT_EQ(updated.response_ids, sample.response_ids);
    EXPECT_EQ(updated.logprobs, sample.logprobs);
    num_changed += half_way.at(name).response_ids != sample.response_ids;
  }
  EXPECT_GT(num_changed, 0) << "the first of the three updates has changed everything";
}

TEST(Dispatcher, RefusesAPartialUpdateOfOtherWeightsOrOfATiedHeadAlone) {
  ThreadRanks ranks(1);
  EXPECT_EQ(format_error(*begin(ranks.dispatcher(), 3, 2)),
            "base_version = 2: expected 0, the current version");
  auto head = tiny_tensors(2);
  head.resize(1);
  head[0].name = "lm_head.weight";
  const Chunk chunk(head);
  ASSERT_FALSE(begin(ranks.dispatcher(), 1, 0));
  ASSERT_FALSE(stage(ranks.dispatcher(), chunk));
  EXPECT_EQ(commit(ranks.dispatcher())->field, "lm_head.weight");
  EXPECT_EQ(ranks.dispatcher().weight_version(), 0);
}

TEST(Dispatcher, KeptSamplesScoreUnderTheVersionStampedOnThem) {
  Config config = tiny_config();
  config.rollout.response_length = 90;
  config.rollout.ignore_eos = true;
  ThreadRanks ranks(2, config);
  ranks.dispatcher().submit(numbered_prompts(8));
  const Chunk chunk(tiny_tensors(2));
  ASSERT_FALSE(begin(ranks.dispatcher(), 1));
  ASSERT_FALSE(stage(ranks.dispatcher(), chunk));
  ASSERT_FALSE(commit(ranks.dispatcher()));
  ASSERT_TRUE(ranks.sink.wait_for(24));
  std::vector<bridge::ScoreSequence> sequences;
  for (const auto& [name, sample] : ranks.sink.samples()) {
    sequences.push_back({.input_ids = *sample.prompt_ids, .response_ids = sample.response_ids});
  }
  std::promise<std::vector<bridge::ScoredSequence>> scored;
  ranks.dispatcher().score(sequences, [&](bridge::Outcome error, auto results) {
    EXPECT_FALSE(error);
    scored.set_value(std::move(results));
  });
  auto future = scored.get_future();
  ASSERT_EQ(future.wait_for(30s), std::future_status::ready);
  const auto results = future.get();
  size_t index = 0;
  for (const auto& [name, sample] : ranks.sink.samples()) {
    const std::vector<float>& logprobs = results[index++].logprobs;
    const bridge::VersionSpan last = sample.weight_versions.back();
    ASSERT_EQ(last.version, 1);
    for (size_t t = last.first_token; t < sample.response_ids.size(); ++t) {
      EXPECT_EQ(sample.logprobs[t], logprobs[t]) << name.first << ", token " << t;
    }
  }
}

TEST(Dispatcher, RefusesBadUpdatesAndGoesOnUnderTheOldWeights) {
  ThreadRanks ranks(2);
  auto refused = [&](std::vector<NamedTensor> tensors) {
    const Chunk chunk(tensors);
    EXPECT_FALSE(begin(ranks.dispatcher(), 1));
    bridge::Outcome error = stage(ranks.dispatcher(), chunk);
    if (!error) error = commit(ranks.dispatcher());
    return error ? format_error(*error) : "accepted";
  };
  auto tensors = tiny_tensors(2);
  tensors.pop_back();
  EXPECT_EQ(refused(tensors),
            "model.layers.1.mlp.down_proj.weight = missing: expected all 20 tensors of the model; "
            "1 of them are missing");
  tensors = tiny_tensors(2);
  tensors[3].shape = {12, 48};
  EXPECT_EQ(refused(tensors),
            "model.layers.0.self_attn.q_proj.weight = [12, 48]: expected [24, 24]; the tensor's "
            "shape does not fit config.json");
  tensors = tiny_tensors(2);
  tensors[3].name = "model.layers.9.self_attn.q_proj.weight";
  EXPECT_EQ(refused(tensors),
            "model.layers.9.self_attn.q_proj.weight = [24, 24]: expected one of this model's 20 "
            "tensors; the model has no such tensor");
  tensors = tiny_tensors(2);
  tensors.push_back(tensors[0]);
  tensors.back().name = "lm_head.weight";
  tensors.back().values[0] += 1;
  EXPECT_EQ(refused(tensors),
            "lm_head.weight = other bytes than model.embed_tokens.weight: expected the same bytes: "
            "tie_word_embeddings is true; leave the head out, or untie the model in config.json");
  EXPECT_EQ(ranks.dispatcher().weight_version(), 0);
  ranks.dispatcher().submit(numbered_prompts(4));
  ASSERT_TRUE(ranks.sink.wait_for(12));
  const auto before = run(1, 4);
  for (const auto& [name, sample] : ranks.sink.samples()) expect_equal(sample, before.at(name));
}

TEST(Dispatcher, RefusesUpdatesOutOfOrder) {
  ThreadRanks ranks(1);
  EXPECT_EQ(commit(ranks.dispatcher())->message, "");
  EXPECT_EQ(format_error(*commit(ranks.dispatcher())),
            "update_weights = commit: expected begin first");
  EXPECT_EQ(format_error(*begin(ranks.dispatcher(), 0)),
            "version = 0: expected more than the current version 0");
  EXPECT_FALSE(begin(ranks.dispatcher(), 1));
  EXPECT_EQ(format_error(*begin(ranks.dispatcher(), 2)),
            "update_weights = begin of version 2: expected the end of version 1's update first");
  ranks.dispatcher().cancel_weights();
  EXPECT_FALSE(begin(ranks.dispatcher(), 2));
}

TEST(Dispatcher, WaitsForStartedSamplesBeforeItSwitches) {
  Config config = tiny_config();
  config.rollout.response_length = 40;
  ThreadRanks ranks(2, config);
  ranks.dispatcher().submit(numbered_prompts(20));
  const Chunk chunk(tiny_tensors(2));
  ASSERT_FALSE(begin(ranks.dispatcher(), 1));
  ASSERT_FALSE(stage(ranks.dispatcher(), chunk));
  ASSERT_FALSE(commit(ranks.dispatcher(), bridge::InFlight::kWait));
  ASSERT_TRUE(ranks.sink.wait_for(60));
  for (const auto& [name, sample] : ranks.sink.samples()) {
    EXPECT_EQ(sample.weight_versions.size(), 1u) << "a sample spans two versions";
  }
}

TEST(Dispatcher, PausesAndResumes) {
  ThreadRanks ranks(2);
  Waiter paused;
  ranks.dispatcher().pause(bridge::InFlight::kKeep, paused.callback());
  ASSERT_FALSE(paused.wait());
  ranks.dispatcher().submit(numbered_prompts(4));
  std::this_thread::sleep_for(50ms);
  EXPECT_TRUE(ranks.sink.samples().empty());
  ranks.dispatcher().resume();
  EXPECT_TRUE(ranks.sink.wait_for(12));
}

TEST(Dispatcher, EndsTheJobWhenARankIsLostAndFailsWhatWaits) {
  ThreadRanks ranks(2);
  std::promise<void> ended;
  ranks.dispatcher().set_on_end([&] { ended.set_value(); });
  ranks.dispatcher().lose_worker(
      1, {.code = ErrorCode::kUnavailable, .field = "rank 1", .value = "gone"});
  EXPECT_EQ(ended.get_future().wait_for(10s), std::future_status::ready);
  EXPECT_EQ(format_error(*ranks.dispatcher().health()), "rank 1 = gone");
  EXPECT_EQ(error_text([&] { ranks.dispatcher().submit(numbered_prompts(1)); }),
            "unavailable: rank 1 = gone");
}

TEST(Dispatcher, MeasuresStepsOnAllRanksAndChangesTheirBatching) {
  ThreadRanks ranks(2);
  Dispatcher& dispatcher = ranks.dispatcher();
  Waiter refused;
  dispatcher.measure("shuffled", refused.callback());
  const bridge::Outcome error = refused.wait();
  ASSERT_TRUE(error);
  EXPECT_EQ(error->field, "engine.batching");

  for (const char* batching : {"continuous", "left_padded"}) {
    Waiter measuring;
    dispatcher.measure(batching, measuring.callback());
    ASSERT_FALSE(measuring.wait());
    std::vector<bridge::PromptRequest> prompts = numbered_prompts(8);
    for (auto& prompt : prompts) prompt.prompt_id->text += batching;
    dispatcher.submit(prompts);
    const size_t num_samples = batching == std::string("continuous") ? 24 : 48;
    ASSERT_TRUE(ranks.sink.wait_for(num_samples));
    std::promise<Measurement> promise;
    dispatcher.take_measurement(
        [&](bridge::Outcome, Measurement measured) { promise.set_value(std::move(measured)); });
    const Measurement measured = promise.get_future().get();
    EXPECT_EQ(measured.first_token_times_s.size(), 24u) << batching;
    EXPECT_FALSE(measured.step_flops.empty());
    EXPECT_EQ(measured.step_flops.size(), measured.step_bytes.size());
    EXPECT_GT(measured.compute_s, 0);
    EXPECT_GT(measured.stats.at("num_steps"), 0);
    // Of the modes only left_padded computes pads.
    EXPECT_EQ(measured.stats.at("num_pad_rows") > 0, batching == std::string("left_padded"));
  }
}

}  // namespace
}  // namespace rollpack::rollout
