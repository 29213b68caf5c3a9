// Steps planned while others are under way give the bits of steps that wait for each other, and
// steps that are graphs those of steps enqueued kernel by kernel, over real numbers and every
// backend, the emulated CUDA one among them: that one has bits of its own.
#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/forwarding_backend.h"
#include "rollout/engine/engine.h"
#include "tests/kernels/delayed_backend.h"
#include "tests/kernels/rig.h"
#include "tests/rollout/tiny_model.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;

// Wants each step waited for.
class WaitedForBackend final : public kernels::ForwardingBackend {
 public:
  explicit WaitedForBackend(std::unique_ptr<kernels::Backend> inner)
      : ForwardingBackend(std::move(inner)), info_(this->inner().info()) {
    info_.max_steps_under_way = 1;
  }
  ~WaitedForBackend() override {
    inner().set_program(nullptr);  // while this is whole: a program may free its buffers here
  }
  const kernels::BackendInfo& info() const override { return info_; }

 private:
  kernels::BackendInfo info_;
};

struct Collected : EngineOutput {
  void on_sample(bridge::Sample sample) override {
    const std::pair name{sample.key.request_id, sample.key.sample_index};
    EXPECT_TRUE(samples.emplace(name, std::move(sample)).second) << "a sample came twice";
  }
  void on_failed(bridge::FailedSample sample) override { ADD_FAILURE() << sample.error.message; }
  void on_scored(uint64_t, bridge::Outcome, bridge::ScoredSequence) override { ADD_FAILURE(); }
  std::map<std::pair<int64_t, int32_t>, bridge::Sample> samples;
};

struct Outcome {
  std::map<std::pair<int64_t, int32_t>, bridge::Sample> samples;
  EngineCounters counters;
  int64_t num_layers = 0;  // run by steps
};

enum class Steps { kWaitedFor, kDelayed };

Outcome run(const std::string& name, Steps steps, bool enforce_eager = false) {
  ModelConfig model = tiny_model_config();
  Config config = tiny_config();
  config.engine.speculation = "off";  // drafts would wait for tokens
  const kernels::ModelShape shape = model.shape(DType::kBF16);
  std::unique_ptr<kernels::Backend> backend = kernels::testing::make_tested_backend(
      name, shape,
      {.num_threads = 1,
       .kv_cache_bytes = config.engine.kv_cache_memory,
       .max_num_seqs = config.engine.max_num_seqs,
       .max_num_batched_tokens = config.engine.max_num_batched_tokens,
       .enforce_eager = enforce_eager});
  if (steps == Steps::kDelayed) {
    backend = std::make_unique<kernels::testing::DelayedBackend>(std::move(backend), 5, 200us);
  } else {
    backend = std::make_unique<WaitedForBackend>(std::move(backend));
  }
  Replica replica(config, model, std::move(backend));
  load_tensors(replica, tiny_tensors(1));
  const int64_t layers_of_start = replica.num_layers_run();
  Collected collected;
  Engine engine(replica.limits(), make_batching_policy("continuous"), replica.backend(), collected);
  std::mt19937 random(4);
  for (int64_t id = 0; id < 4; ++id) {
    GroupRequest group;
    group.key = {.request_id = id, .prompt_id = {.text = std::to_string(id)}, .group_size = 3};
    std::vector<int32_t> prompt(5 + random() % 20);
    for (int32_t& token : prompt) token = static_cast<int32_t>(random() % 71);
    group.prompt_ids = std::make_shared<const std::vector<int32_t>>(std::move(prompt));
    group.sampling = {.params = {.temperature = 1.0f, .top_k = id % 2 == 0 ? 0 : 20},
                      .seed = 11,
                      .response_length = 10,
                      .stop_token_ids = {1, 2, 3, 4, 5, 6, 7}};
    engine.add(group);
  }
  while (engine.has_work()) {
    EXPECT_EQ(engine.step(60s), Engine::StepOutcome::kDone);
  }
  return {std::move(collected.samples), engine.state().counters,
          replica.num_layers_run() - layers_of_start};
}

void expect_same_samples(const Outcome& got, const Outcome& want) {
  ASSERT_EQ(got.samples.size(), want.samples.size());
  for (const auto& [name, sample] : want.samples) {
    const bridge::Sample& other = got.samples.at(name);
    EXPECT_EQ(other.response_ids, sample.response_ids) << name.first << " " << name.second;
    EXPECT_EQ(other.logprobs, sample.logprobs) << name.first << " " << name.second;
    EXPECT_EQ(other.support_logmass, sample.support_logmass);
    EXPECT_EQ(other.finish_reason, sample.finish_reason);
  }
}

class StepsAhead : public ::testing::TestWithParam<std::string> {};

TEST_P(StepsAhead, GiveTheBitsOfStepsThatWaitForEachOtherAndOfKernelsOneByOne) {
  const Outcome want = run(GetParam(), Steps::kWaitedFor), got = run(GetParam(), Steps::kDelayed);
  EXPECT_EQ(want.counters.num_rows_after_stop, 0);
  EXPECT_GT(got.counters.num_rows_after_stop, 0);
  expect_same_samples(got, want);
  const bool has_graphs = GetParam() == kernels::testing::kEmulatedCuda || GetParam() == "cuda";
  if (!has_graphs) return;
  const Outcome eager = run(GetParam(), Steps::kWaitedFor, true);
  expect_same_samples(eager, want);
  EXPECT_EQ(eager.num_layers, want.num_layers);  // replayed layers count as run
}

INSTANTIATE_TEST_SUITE_P(Backends, StepsAhead,
                         ::testing::ValuesIn(kernels::testing::tested_backends()));

}  // namespace
}  // namespace rollpack::rollout
