// Weights that change under the dispatcher: on all ranks or on none, whole or in part.
#include <gtest/gtest.h>

#include <future>

#include "kernels/base/error.h"
#include "rollout/cluster/dispatcher.h"
#include "tests/rollout/cluster/thread_ranks.h"
#include "tests/rollout/cluster/weight_chunk.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;

TEST(WeightUpdate, SwitchesWeightsOnAllRanksAndStampsTheVersion) {
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

TEST(WeightUpdate, PartialUpdatesOneAfterTheOtherGiveTheBitsOfAWholeOne) {
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

TEST(WeightUpdate, RefusesAPartialUpdateOfOtherWeightsOrOfATiedHeadAlone) {
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

TEST(WeightUpdate, KeptSamplesScoreUnderTheVersionStampedOnThem) {
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

TEST(WeightUpdate, RefusesBadUpdatesAndGoesOnUnderTheOldWeights) {
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

TEST(WeightUpdate, RefusesUpdatesOutOfOrder) {
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

TEST(WeightUpdate, WaitsForStartedSamplesBeforeItSwitches) {
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

}  // namespace
}  // namespace rollpack::rollout
