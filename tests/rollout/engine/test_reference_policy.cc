// Samples of one model, scored by another that stays as it is.
#include <map>
#include <vector>

#include <gtest/gtest.h>

#include "rollout/engine/reference_policy.h"
#include "tests/rollout/tiny_model.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;

// Takes what an engine makes.
class Kept : public EngineOutput {
 public:
  void on_sample(bridge::Sample sample) override { samples.push_back(std::move(sample)); }
  void on_failed(bridge::FailedSample) override { ADD_FAILURE() << "a sample failed"; }
  void on_scored(uint64_t, bridge::Outcome error, bridge::ScoredSequence scored) override {
    EXPECT_FALSE(error);
    scores.push_back(std::move(scored.scaled_logprobs));
  }
  std::vector<bridge::Sample> samples;
  std::vector<std::vector<float>> scores;
};

void finish(Engine& engine) {
  while (engine.has_work()) engine.step(30s);
}

std::vector<bridge::Sample> drawn_samples() {
  const auto live = tiny_replica(tiny_config());
  Kept kept;
  Engine engine(live->limits(), make_batching_policy("continuous"), live->backend(), kept);
  for (int32_t prompt = 0; prompt < 5; ++prompt) {
    GroupRequest group;
    group.key = {.prompt_index = prompt, .prompt_id = {.text = std::to_string(prompt)}};
    group.key.group_size = 4;
    group.prompt_ids = std::make_shared<const std::vector<int32_t>>(
        std::vector<int32_t>(static_cast<size_t>(1 + 7 * prompt), 3 + prompt));
    group.sampling.params.temperature = prompt % 2 == 0 ? 1.0f : 0.7f;
    group.sampling.response_length = 10;
    engine.add(std::move(group));
  }
  finish(engine);
  EXPECT_EQ(kept.samples.size(), 20u);
  return kept.samples;
}

// The scores of `sample` under `replica`, with nothing else in any step.
std::vector<float> scores_alone(const bridge::Sample& sample, Replica& replica) {
  Kept kept;
  Engine engine(replica.limits(), make_batching_policy("continuous"), replica.backend(), kept);
  engine.add_score({.sequence = {.input_ids = *sample.prompt_ids,
                                 .response_ids = sample.response_ids,
                                 .temperature = sample.temperature}});
  finish(engine);
  return kept.scores.at(0);
}

void refuse(const bridge::FailedSample& sample) {
  ADD_FAILURE() << format_error(sample.error);
}

TEST(ReferencePolicy, GivesEachSampleTheBitsOfScoringItAlone) {
  std::vector<bridge::Sample> scored;
  ReferencePolicy reference(
      tiny_replica(tiny_config(), /*seed=*/2),
      [&](bridge::Sample sample) { scored.push_back(std::move(sample)); }, refuse);
  for (const bridge::Sample& sample : drawn_samples()) reference.add(sample);
  EXPECT_EQ(reference.num_waiting(), 20);
  EXPECT_TRUE(reference.fills_a_step());
  while (reference.num_waiting() > 0) {
    ASSERT_EQ(reference.step(30s, [] { return false; }), Engine::StepOutcome::kDone);
  }
  EXPECT_FALSE(reference.fills_a_step());
  ASSERT_EQ(scored.size(), 20u);
  const auto replica = tiny_replica(tiny_config(), /*seed=*/2);
  for (const bridge::Sample& sample : scored) {
    EXPECT_EQ(sample.ref_log_prob, scores_alone(sample, *replica));
    EXPECT_NE(sample.ref_log_prob, sample.scaled_logprobs) << "both models are the same";
  }
}

TEST(ReferencePolicy, GivesTheLivePolicysBitsWhereBothAreTheSame) {
  std::vector<bridge::Sample> scored;
  ReferencePolicy reference(
      tiny_replica(tiny_config()),
      [&](bridge::Sample sample) { scored.push_back(std::move(sample)); }, refuse);
  for (const bridge::Sample& sample : drawn_samples()) reference.add(sample);
  while (reference.num_waiting() > 0) reference.step(30s, [] { return false; });
  ASSERT_EQ(scored.size(), 20u);
  for (const bridge::Sample& sample : scored) {
    EXPECT_EQ(sample.ref_log_prob, sample.scaled_logprobs);
  }
}

TEST(ReferencePolicy, HandsBackWhatWaitsAndWhatHasNothingToScore) {
  std::vector<bridge::Sample> given;
  ReferencePolicy reference(
      tiny_replica(tiny_config()),
      [&](bridge::Sample sample) { given.push_back(std::move(sample)); }, refuse);
  std::vector<bridge::Sample> samples = drawn_samples();
  samples.resize(3);
  bridge::Sample empty = samples[0];
  empty.response_ids.own().clear();
  reference.add(empty);
  EXPECT_EQ(given.size(), 1u);
  for (const bridge::Sample& sample : samples) reference.add(sample);
  reference.give_up();
  ASSERT_EQ(given.size(), 4u);
  for (size_t i = 0; i < samples.size(); ++i) {
    EXPECT_EQ(given[i + 1].response_ids, samples[i].response_ids);
    EXPECT_TRUE(given[i + 1].ref_log_prob.empty());
  }
  EXPECT_EQ(reference.num_waiting(), 0);
}

TEST(ReferencePolicy, FailsASampleThatItCannotHold) {
  std::vector<bridge::FailedSample> failed;
  ReferencePolicy reference(
      tiny_replica(tiny_config()), [](bridge::Sample) { ADD_FAILURE() << "it was scored"; },
      [&](bridge::FailedSample sample) { failed.push_back(std::move(sample)); });
  bridge::Sample sample = drawn_samples().at(0);
  sample.prompt_ids = std::make_shared<const std::vector<int32_t>>(200, 5);
  reference.add(sample);
  ASSERT_EQ(failed.size(), 1u);
  EXPECT_EQ(failed[0].error.field, "input_ids + response_ids");
}

}  // namespace
}  // namespace rollpack::rollout
