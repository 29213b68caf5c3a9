// An engine over the simulated backend, and what each sample must be: computed alone, straight from
// the definition of the simulated model.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <memory>
#include <random>

#include "kernels/base/checksum.h"
#include "rollout/engine/engine.h"
#include "tests/kernels/delayed_backend.h"
#include "tests/rollout/engine/simulated_backend.h"

namespace rollpack::rollout {

using namespace std::chrono_literals;

inline constexpr int32_t kVocab = 100;
using SampleName = std::pair<int64_t, int32_t>;  // request, sample_index

// What the engine hands out, each once.
struct Collected : EngineOutput {
  void on_sample(bridge::Sample sample) override {
    const SampleName name{sample.key.request_id, sample.key.sample_index};
    EXPECT_TRUE(samples.emplace(name, std::move(sample)).second) << "a sample came twice";
  }
  void on_failed(bridge::FailedSample sample) override {
    const SampleName name{sample.key.request_id, sample.key.sample_index};
    EXPECT_TRUE(failed.emplace(name, std::move(sample.error)).second) << "a sample failed twice";
  }
  void on_scored(uint64_t ticket, bridge::Outcome error, bridge::ScoredSequence result) override {
    if (error) {
      EXPECT_TRUE(failed_scores.emplace(ticket, *error).second) << "a score failed twice";
    } else {
      EXPECT_TRUE(scored.emplace(ticket, std::move(result)).second) << "a score came twice";
    }
  }
  std::map<SampleName, bridge::Sample> samples;
  std::map<SampleName, ErrorInfo> failed;
  std::map<uint64_t, bridge::ScoredSequence> scored;
  std::map<uint64_t, ErrorInfo> failed_scores;
};

// When the backend computes.
enum class Timing : uint8_t {
  kAtOnce,   // before submit() returns
  kLate,     // with a step more under way, by chance when it is waited for
  kDelayed,  // the same on a thread of its own, some time later
};

struct RigOptions {
  std::string batching = "continuous";
  Speculation speculation = Speculation::kOff;
  int32_t vocab_size = kVocab;
  int32_t num_pages = 64;
  int32_t max_num_seqs = 8;
  int32_t max_num_batched_tokens = 32;
  int32_t num_speculative_tokens = 5;
  bool chunked_prefill = true;
  bool prefix_sharing = true;
  Timing timing = Timing::kAtOnce;
  uint32_t lateness = 0;  // seed
};

struct Rig {
  explicit Rig(const RigOptions& options)
      : timed_backend(make_backend(options, backend)),
        engine({.max_num_seqs = options.max_num_seqs,
                .max_num_batched_tokens = options.max_num_batched_tokens,
                .page_tokens = 4,
                .num_pages = options.num_pages,
                .page_bytes = 1,
                .max_positions = 1000,
                .chunked_prefill = options.chunked_prefill,
                .prefix_sharing = options.prefix_sharing,
                .speculation = options.speculation,
                .num_speculative_tokens = options.num_speculative_tokens},
               make_batching_policy(options.batching), *timed_backend, collected) {}

  void run_to_end() {
    for (int steps = 0; engine.has_work(); ++steps) {
      ASSERT_LT(steps, 100000) << "the engine does not come to an end";
      ASSERT_EQ(engine.step(1s), Engine::StepOutcome::kDone)
          << "work is left but no step is planned";
    }
    expect_nothing_held();
  }
  void expect_nothing_held() const {
    expect_accounts_balance();
    EXPECT_EQ(engine.state().pool.num_available(), engine.state().pool.num_pages());
    EXPECT_EQ(static_cast<int32_t>(engine.state().free_slots.size()),
              engine.state().limits.max_num_seqs);
  }
  // Every page is accounted for: as often referred to as sequences hold it, cached, or free.
  void expect_accounts_balance() const {
    const EngineState& state = engine.state();
    std::vector<int32_t> num_held(state.pool.num_pages(), 0);
    size_t num_slots = state.free_slots.size();
    for (const auto& sequence : state.running) {
      for (const int32_t page : sequence->pages) ++num_held[page];
      num_slots += sequence->slot >= 0 ? 1 : 0;
    }
    EXPECT_EQ(static_cast<int32_t>(num_slots), state.limits.max_num_seqs);
    int32_t num_used = 0, num_idle = 0;
    for (int32_t page = 0; page < state.pool.num_pages(); ++page) {
      EXPECT_EQ(state.pool.num_references(page), num_held[page]) << "page " << page;
      num_used += num_held[page] > 0 ? 1 : 0;
      num_idle += num_held[page] == 0 && state.pool.is_kept(page) ? 1 : 0;
    }
    EXPECT_EQ(state.pool.num_idle(), num_idle);
    EXPECT_EQ(state.pool.num_free(), state.pool.num_pages() - num_used - num_idle);
    EXPECT_NO_THROW(state.index.check());
  }

  // The backend as the engine sees it; `simulated`: the one that computes.
  static std::unique_ptr<kernels::Backend> make_backend(const RigOptions& options,
                                                        SimulatedBackend*& simulated) {
    auto made = std::make_unique<SimulatedBackend>(
        SimulatedBackend::Options{.num_pages = options.num_pages,
                                  .num_slots = options.max_num_seqs,
                                  .max_rows = options.max_num_batched_tokens,
                                  .max_steps_under_way = options.timing == Timing::kLate ? 2 : 1,
                                  .lateness = options.lateness,
                                  .vocab_size = options.vocab_size});
    simulated = made.get();
    if (options.timing != Timing::kDelayed) return made;
    return std::make_unique<kernels::testing::DelayedBackend>(std::move(made), options.lateness,
                                                              std::chrono::microseconds(3));
  }

  Collected collected;
  SimulatedBackend* backend = nullptr;
  std::unique_ptr<kernels::Backend> timed_backend;
  Engine engine;
};

inline GroupRequest random_group(std::mt19937& random, int64_t request_id, int32_t max_prompt = 20,
                                 int32_t max_response = 24) {
  const auto below = [&](int32_t n) { return static_cast<int32_t>(random() % n); };
  std::vector<int32_t> prompt(1 + below(max_prompt));
  for (int32_t& token : prompt) token = below(kVocab);
  GroupRequest group;
  group.key = {.request_id = request_id,
               .prompt_id = {.text = std::to_string(request_id)},
               .group_size = 1 + below(6)};
  group.prompt_ids = std::make_shared<const std::vector<int32_t>>(prompt);
  group.sampling = {.seed = 7,
                    .response_length = 1 + below(max_response),
                    .min_tokens = below(3),
                    .stop_token_ids = {3, 50}};
  return group;
}

// The sample computed by itself, straight from the definition of the simulated model.
inline std::vector<int32_t> alone(const GroupRequest& group, int32_t sample_index,
                                  uint64_t version) {
  std::vector<int32_t> tokens = *group.prompt_ids;
  std::vector<uint64_t> keys;
  std::vector<int32_t> response;
  const size_t num_prompt = tokens.size();
  for (size_t position = 0;; ++position) {
    uint64_t seen = 0;
    for (const uint64_t key : keys) seen = mix(seen, key);
    keys.push_back(SimulatedBackend::row_hash(version, seen, tokens[position]));
    if (position + 1 < num_prompt) continue;
    const int32_t token = SimulatedBackend::draw(
        keys.back(), group.sampling.seed, fnv1a64(group.key.prompt_id.text), sample_index, kVocab);
    response.push_back(token);
    tokens.push_back(token);
    const auto length = static_cast<int32_t>(response.size());
    const bool stops = std::ranges::binary_search(group.sampling.stop_token_ids, token) &&
                       length > group.sampling.min_tokens;
    if (stops || length == group.sampling.response_length) return response;
  }
}

// Each token of `sample` is what follows its whole prefix under the version stamped on it.
inline void expect_stamped(const bridge::Sample& sample, const GroupRequest& group) {
  const auto length = static_cast<int32_t>(sample.response_ids.size());
  for (size_t span = 0; span < sample.weight_versions.size(); ++span) {
    const auto [first, version] = sample.weight_versions[span];
    GroupRequest rest = group;  // from the tokens before the span
    std::vector<int32_t> prefix = *group.prompt_ids;
    prefix.insert(prefix.end(), sample.response_ids.begin(), sample.response_ids.begin() + first);
    rest.prompt_ids = std::make_shared<const std::vector<int32_t>>(prefix);
    rest.sampling.response_length -= first;
    rest.sampling.min_tokens -= first;
    const auto expected = alone(rest, sample.key.sample_index, static_cast<uint64_t>(version));
    const int32_t end = span + 1 < sample.weight_versions.size()
                            ? sample.weight_versions[span + 1].first_token
                            : length;
    ASSERT_LE(end - first, static_cast<int32_t>(expected.size()));
    for (int32_t t = first; t < end; ++t) {
      ASSERT_EQ(sample.response_ids[t], expected[t - first])
          << "request " << sample.key.request_id << ", sample " << sample.key.sample_index
          << ", token " << t;
    }
  }
  ASSERT_EQ(sample.weight_versions.empty(), length == 0);
  ASSERT_EQ(sample.logprobs.size(), sample.response_ids.size());
  if (sample.finish_reason == bridge::FinishReason::kLength) {
    EXPECT_EQ(length, group.response_limit(sample.key.sample_index));
  } else if (sample.finish_reason == bridge::FinishReason::kStop) {
    EXPECT_TRUE(
        std::ranges::binary_search(group.sampling.stop_token_ids, sample.response_ids.back()));
  }
}

inline const EngineCounters& counters_of(const Rig& rig) {
  return rig.engine.state().counters;
}

inline GroupRequest group_of(int64_t request_id, std::vector<int32_t> prompt,
                             int32_t num_samples = 1, int32_t response_length = 5) {
  GroupRequest group;
  group.key = {.request_id = request_id,
               .prompt_id = {.text = std::to_string(request_id)},
               .group_size = num_samples};
  group.prompt_ids = std::make_shared<const std::vector<int32_t>>(std::move(prompt));
  group.sampling = {.seed = 7, .response_length = response_length};
  return group;
}

// Logprobs of a response given, computed by itself.
inline std::vector<float> score_alone(const bridge::ScoreSequence& given, uint64_t version) {
  std::vector<int32_t> tokens = given.input_ids;
  tokens.insert(tokens.end(), given.response_ids.begin(), given.response_ids.end());
  std::vector<float> logprobs;
  std::vector<uint64_t> keys;
  for (size_t position = 0; position + 1 < tokens.size(); ++position) {
    uint64_t seen = 0;
    for (const uint64_t key : keys) seen = mix(seen, key);
    keys.push_back(SimulatedBackend::row_hash(version, seen, tokens[position]));
    if (position + 1 < given.input_ids.size()) continue;
    logprobs.push_back(SimulatedBackend::logprob(keys.back(), tokens[position + 1]));
  }
  return logprobs;
}

inline void expect_alone(const Collected& collected, const GroupRequest& group,
                         uint64_t version = 0) {
  for (int32_t i = 0; i < group.key.group_size; ++i) {
    const auto found = collected.samples.find({group.key.request_id, i});
    ASSERT_NE(found, collected.samples.end()) << "request " << group.key.request_id;
    EXPECT_EQ(found->second.response_ids, alone(group, i, version))
        << "request " << group.key.request_id << ", sample " << i;
  }
}

}  // namespace rollpack::rollout
