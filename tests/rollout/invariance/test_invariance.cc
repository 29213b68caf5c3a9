// The promise of the whole: a sample is a pure function of weights, prompt, sampling and seed. A
// configuration is drawn by seed from every axis that may not matter, a fixed set of requests runs
// through it on ranks that are threads, and a hash over all bytes of all samples and scores must be
// that of the requests computed one alone at a time, on portable code.
//
// 500 configurations; 10,000 with ROLLPACK_FULL=1. ROLLPACK_SEED=n runs the n-th alone.
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <chrono>
#include <cstdlib>
#include <future>
#include <iostream>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "kernels/base/checksum.h"
#include "tests/kernels/delayed_backend.h"
#include "tests/rollout/cluster/thread_ranks.h"
#include "tests/rollout/invariance/request_sets.h"
#include "tests/rollout/invariance/scattered_backend.h"
#include "tests/sanitized.h"

namespace rollpack::rollout {
namespace {

using namespace std::chrono_literals;
using kernels::cpu::Isa;

constexpr int kNumShards = 4;  // tests that ctest may run beside each other
constexpr uint32_t kNumSeeds = kIsSanitized ? 24 : 500;
constexpr uint32_t kNumSeedsFull = 10000;

// Under sanitizers portable code is the slowest.
Isa isa_of_alone() {
  return kIsSanitized ? kernels::cpu::supported_isas().front() : Isa::kPortable;
}

uint32_t num_seeds() {
  const char* full = std::getenv("ROLLPACK_FULL");
  return full != nullptr && std::string_view(full) == "1" ? kNumSeedsFull : kNumSeeds;
}

using Samples = std::map<KeepingSink::Name, bridge::Sample>;

void append(std::string& bytes, const std::vector<float>& values) {
  for (const float value : values) {
    const auto word = std::bit_cast<uint32_t>(value);
    bytes.append(reinterpret_cast<const char*>(&word), sizeof(word));
  }
}

std::string bytes_of(const bridge::Sample& sample) {
  std::string bytes = fmt::format("{} {} {} {} {} ", sample.key.prompt_id.text,
                                  sample.key.sample_index, sample.response_ids,
                                  static_cast<int>(sample.finish_reason), sample.stop_token_id);
  append(bytes, sample.logprobs);
  append(bytes, sample.scaled_logprobs);
  append(bytes, sample.support_logmass);
  append(bytes, sample.entropy);
  return bytes;
}

std::string bytes_of(const bridge::ScoredSequence& score) {
  std::string bytes;
  append(bytes, score.logprobs);
  append(bytes, score.scaled_logprobs);
  append(bytes, score.entropy);
  return bytes;
}

struct Output {
  Samples samples;
  std::vector<bridge::ScoredSequence> scored;
  // Not hashed: drafts that have come true, rows planned ahead of a stop.
  double num_accepted_tokens = 0;
  double num_rows_after_stop = 0;

  uint64_t hash() const {
    std::string bytes;
    for (const auto& [name, sample] : samples) bytes += bytes_of(sample);
    for (const bridge::ScoredSequence& score : scored) bytes += bytes_of(score);
    return fnv1a64(bytes);
  }
};

// What a run is asked to do; the same of every configuration.
struct Task {
  TestModel model;
  std::vector<NamedTensor> tensors;
  RequestSet requests;
  std::vector<bridge::ScoreSequence> scores;  // of samples that ran alone
  Output alone;                               // all that came out then
  uint64_t hash = 0;                          // its hash; 0: not run yet
};

// The first sample or score that is not as it was alone, for the one who looks for the reason.
std::string first_difference(const Output& output, const Output& alone) {
  for (const auto& [name, sample] : alone.samples) {
    const auto found = output.samples.find(name);
    if (found == output.samples.end())
      return fmt::format("{} {} is missing", name.first, name.second);
    if (bytes_of(found->second) != bytes_of(sample)) {
      return fmt::format("{} {}: tokens {} instead of {}", name.first, name.second,
                         found->second.response_ids, sample.response_ids);
    }
  }
  for (size_t i = 0; i < alone.scored.size(); ++i) {
    if (bytes_of(output.scored.at(i)) != bytes_of(alone.scored[i])) {
      return fmt::format("score of {}", alone.scored[i].id.text);
    }
  }
  return "none";
}

struct Variant {
  size_t task = 0;
  std::vector<std::string> settings;  // of the configuration, "engine.batching=continuous"
  int64_t num_pages = 64;
  std::vector<Isa> isas = {Isa::kPortable};  // one a rank
  std::vector<int32_t> num_threads = {1};    // one a rank
  bool widens_products = false;              // of bf16 models, whatever the machine prefers
  int num_passes = 1;                        // the second finds a warm prefix cache
  std::optional<uint32_t> scatter_seed;
  std::optional<uint32_t> delay_seed;  // steps take their time: the next one is planned ahead

  std::string text() const {
    std::vector<std::string_view> names;
    for (const Isa isa : isas) names.push_back(kernels::cpu::isa_name(isa));
    return fmt::format(
        "{}, {} pages, ranks on {} with {} threads, products {}, {} passes, pages {}, steps {}",
        fmt::join(settings, " "), num_pages, names, num_threads,
        widens_products ? "widened" : "of pairs", num_passes,
        scatter_seed ? "scattered" : "in order", delay_seed ? "delayed" : "waited for");
  }
};

// ---- the axes -----------------------------------------------------------------------------------

// What the configuration allows for a switch or a choice of words in its section engine; empty: it
// has no such field.
std::vector<std::string> choices_of(std::string_view name) {
  std::vector<std::string> choices;
  EngineSection section;
  EngineSection::fields(section, [&](std::string_view field, auto&, const auto& rule, auto&&...) {
    if (field != name) return;
    using Rule = std::remove_cvref_t<decltype(rule)>;
    if constexpr (std::is_same_v<Rule, OneOf>) {
      choices.assign(rule.choices.begin(), rule.choices.end());
    } else if constexpr (std::is_same_v<Rule, Flag>) {
      choices = {"true", "false"};
    }
  });
  return choices;
}

std::vector<std::string> numbers(int32_t first, int32_t last, std::vector<int32_t> others = {}) {
  std::vector<std::string> values;
  for (int32_t i = first; i <= last; ++i) values.push_back(std::to_string(i));
  for (const int32_t other : others) values.push_back(std::to_string(other));
  return values;
}

struct Axis {
  std::string setting;
  std::vector<std::string> values;
};

// A line a setting that must not matter; those without values are not built.
std::vector<Axis> make_axes(const RequestSet& requests) {
  // The long set's first prompt is cut first where the step ends, then wherever others leave room.
  std::vector<std::string> num_rows = numbers(1, 300, {512}), num_seqs = numbers(1, 8);
  if (requests.name == "crowd") num_rows = num_seqs = numbers(1, 70, {256, 513});
  if (requests.name == "wide") num_rows = num_seqs = {"256", "513"};
  return {
      {"engine.max_num_batched_tokens", num_rows},
      {"engine.max_num_seqs", num_seqs},
      {"engine.batching", choices_of("batching")},
      {"engine.enable_prefix_caching", choices_of("enable_prefix_caching")},
      {"engine.enable_chunked_prefill", choices_of("enable_chunked_prefill")},
      {"engine.speculation", choices_of("speculation")},
      {"engine.num_speculative_tokens", numbers(1, 8, {64})},
  };
}

// Made once a set: variants are drawn by the thousand.
const std::vector<Axis>& axes_of(const RequestSet& requests) {
  static std::map<std::string, std::vector<Axis>> made;
  std::vector<Axis>& axes = made[requests.name];
  if (axes.empty()) axes = make_axes(requests);
  return axes;
}

// Pages that are just enough, that force waiting and preemption, and that are plenty.
std::vector<int64_t> page_counts(const RequestSet& requests) {
  const int64_t least = (requests.longest + 15) / 16 + 1;
  return {least, 3 * least, 12 * least, 700};
}

std::vector<Task>& tasks();

Variant draw_variant(uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&](size_t end) { return random() % end; };
  Variant variant;
  // Sets in turn by weight: the long one has the most places to be cut at.
  const size_t set = std::array<size_t, 8>{0, 0, 0, 0, 1, 1, 1, 2}[below(8)];
  variant.task = below(3) * 3 + set;
  const RequestSet& requests = tasks()[variant.task].requests;
  int32_t num_rows = 0;
  for (const Axis& axis : axes_of(requests)) {
    if (axis.values.empty()) continue;
    std::string value = axis.values[below(axis.values.size())];
    if (axis.setting == "engine.max_num_batched_tokens") num_rows = std::stoi(value);
    // Without chunks a prompt longer than a step is refused.
    if (axis.setting == "engine.enable_chunked_prefill" && num_rows < requests.longest) {
      value = "true";
    }
    variant.settings.push_back(axis.setting + "=" + value);
  }
  const std::vector<int64_t> pages = page_counts(requests);
  variant.num_pages = pages[below(pages.size())];
  const std::vector<Isa> isas = kernels::cpu::supported_isas();
  const size_t num_ranks = 1 + below(3);
  variant.isas.clear();
  variant.num_threads.clear();
  for (size_t rank = 0; rank < num_ranks; ++rank) {
    variant.isas.push_back(isas[below(isas.size())]);
    variant.num_threads.push_back(static_cast<int32_t>(1 + below(3)));
  }
  variant.num_passes = static_cast<int>(1 + below(2));
  if (below(2) == 0) variant.scatter_seed = seed;
  variant.widens_products = below(2) == 0;
  if (below(3) == 0) variant.delay_seed = seed;
  return variant;
}

// ---- a run --------------------------------------------------------------------------------------

Config config_of(const Variant& variant, const Task& task, int64_t page_bytes) {
  Config config =
      parse_config(fmt::format("model: {{path: in memory}}\nrollout: {{prompt_length: {}}}\n",
                               task.requests.longest),
                   "test_invariance", variant.settings);
  config.model.dtype = task.model.dtype == DType::kF32 ? "float32" : "bfloat16";
  config.engine.kv_cache_memory = variant.num_pages * page_bytes;
  config.bridge.columns = {"entropy"};
  return config;
}

std::unique_ptr<Replica> make_replica(const Variant& variant, const Task& task, int rank) {
  const kernels::ModelShape shape = task.model.config.shape(task.model.dtype);
  const kernels::CpuOptions cpu_options = {.isa = variant.isas[static_cast<size_t>(rank)],
                                           .widens_products = variant.widens_products};
  kernels::BackendOptions options = {.num_threads = 1, .kv_cache_bytes = 1 << 20};
  static std::map<std::string, int64_t> page_bytes;
  int64_t& bytes = page_bytes[task.model.name];
  if (bytes == 0) {
    bytes = kernels::make_cpu_backend(shape, options, cpu_options)->info().kv.page_bytes;
  }
  const Config config = config_of(variant, task, bytes);
  options = {.num_threads = variant.num_threads[static_cast<size_t>(rank)],
             .kv_cache_bytes = config.engine.kv_cache_memory,
             .max_num_seqs = config.engine.max_num_seqs,
             .max_num_batched_tokens = config.engine.max_num_batched_tokens};
  std::unique_ptr<kernels::Backend> backend;
  if (variant.scatter_seed) {
    backend = std::make_unique<ScatteredBackend>(
        shape, options, cpu_options, *variant.scatter_seed + static_cast<uint32_t>(rank));
  } else {
    backend = kernels::make_cpu_backend(shape, options, cpu_options);
  }
  if (variant.delay_seed) {
    backend = std::make_unique<kernels::testing::DelayedBackend>(
        std::move(backend), *variant.delay_seed + static_cast<uint32_t>(rank), 100us);
  }
  auto replica = std::make_unique<Replica>(config, task.model.config, std::move(backend));
  load_tensors(*replica, task.tensors);
  return replica;
}

// What each pass gave.
std::vector<Output> run(const Variant& variant, const Task& task) {
  ThreadRanks ranks(static_cast<int>(variant.isas.size()),
                    [&](int rank) { return make_replica(variant, task, rank); });
  std::vector<Output> outputs;
  for (int pass = 0; pass < variant.num_passes; ++pass) {
    ranks.dispatcher().submit(task.requests.prompts);
    std::promise<std::vector<bridge::ScoredSequence>> scored;
    ranks.dispatcher().score(task.scores, [&](bridge::Outcome error, auto results) {
      EXPECT_FALSE(error) << format_error(*error);
      scored.set_value(std::move(results));
    });
    // Nine threads of ranks on two busy cores may take their time; only a hang takes minutes.
    EXPECT_TRUE(ranks.sink.wait_for(static_cast<size_t>(task.requests.num_samples), 300s));
    for (const bridge::FailedSample& failed : ranks.sink.failed()) {
      ADD_FAILURE() << format_error(failed.error);
    }
    const std::map<std::string, double> stats = ranks.stats();
    outputs.push_back({ranks.sink.take_samples(), scored.get_future().get(),
                       stats.at("num_accepted_tokens"), stats.at("num_rows_after_stop")});
  }
  return outputs;
}

// Every sequence alone in every step; then scores of some of what came out.
void define(Task& task) {
  Variant alone;
  alone.isas = {isa_of_alone()};
  alone.settings = {"engine.max_num_seqs=1", "engine.max_num_batched_tokens=512",
                    "engine.enable_prefix_caching=false", "engine.speculation=off"};
  const Samples samples = run(alone, task).front().samples;
  ASSERT_EQ(samples.size(), static_cast<size_t>(task.requests.num_samples));
  std::vector<const bridge::Sample*> scored;
  for (const auto& [name, sample] : samples) {
    if (name.second != 0 || task.scores.size() == 6 || sample.temperature == 0) continue;
    task.scores.push_back({.id = sample.key.prompt_id,
                           .input_ids = *sample.prompt_ids,
                           .response_ids = sample.response_ids,
                           .temperature = sample.temperature,
                           .origin = "score"});
    scored.push_back(&sample);
  }
  task.alone = run(alone, task).front();
  ASSERT_EQ(task.alone.samples.size(), samples.size());
  for (const auto& [name, sample] : samples) {
    ASSERT_EQ(bytes_of(task.alone.samples.at(name)), bytes_of(sample)) << "beside scores";
  }
  for (size_t i = 0; i < scored.size(); ++i) {
    const bridge::ScoredSequence generated = {.logprobs = scored[i]->logprobs,
                                              .scaled_logprobs = scored[i]->scaled_logprobs,
                                              .entropy = scored[i]->entropy};
    ASSERT_EQ(bytes_of(task.alone.scored.at(i)), bytes_of(generated))
        << "scores of " << scored[i]->key.prompt_id.text;
  }
  task.hash = task.alone.hash();
}

std::vector<Task>& tasks() {
  static std::vector<Task> all;
  if (!all.empty()) return all;
  for (const TestModel& model : test_models()) {
    const int64_t V = model.config.vocab_size;
    for (const RequestSet& requests : {long_requests(V), crowd_of_requests(V), wide_requests(V)}) {
      all.push_back(
          {.model = model, .tensors = tiny_tensors(1, model.config), .requests = requests});
    }
  }
  return all;
}

// ---- tests --------------------------------------------------------------------------------------

TEST(Configurations, DrawEveryValueOfEveryAxis) {
  std::map<std::string, std::set<std::string>> drawn;
  for (uint32_t seed = 0; seed < kNumSeedsFull; ++seed) {
    const Variant variant = draw_variant(seed);
    const std::string set = tasks()[variant.task].requests.name;
    for (const std::string& setting : variant.settings) drawn[set].insert(setting);
    drawn["ranks"].insert(std::to_string(variant.isas.size()));
    for (const int32_t num : variant.num_threads) drawn["threads"].insert(std::to_string(num));
    for (const Isa isa : variant.isas)
      drawn["isas"].insert(std::string(kernels::cpu::isa_name(isa)));
    drawn["tasks"].insert(std::to_string(variant.task));
    drawn["delays"].insert(variant.delay_seed ? "delayed" : "waited for");
  }
  for (const Task& task : tasks()) {
    for (const Axis& axis : axes_of(task.requests)) {
      for (const std::string& value : axis.values) {
        EXPECT_TRUE(drawn[task.requests.name].contains(axis.setting + "=" + value))
            << task.requests.name << ": " << axis.setting << "=" << value;
      }
    }
  }
  EXPECT_EQ(drawn["ranks"].size(), 3u);
  EXPECT_EQ(drawn["threads"].size(), 3u);
  EXPECT_EQ(drawn["delays"].size(), 2u);
  EXPECT_EQ(drawn["isas"].size(), kernels::cpu::supported_isas().size());
  EXPECT_EQ(drawn["tasks"].size(), tasks().size());
}

class EveryConfiguration : public ::testing::TestWithParam<int> {};

TEST_P(EveryConfiguration, GivesTheHashOfSamplesThatAreAlone) {
  std::vector<uint32_t> seeds;
  for (uint32_t seed = static_cast<uint32_t>(GetParam()); seed < num_seeds(); seed += kNumShards) {
    seeds.push_back(seed);
  }
  if (const char* only = std::getenv("ROLLPACK_SEED")) {
    const auto seed = static_cast<uint32_t>(std::atoi(only));
    if (seed % kNumShards != static_cast<uint32_t>(GetParam())) GTEST_SKIP() << "another's seed";
    seeds = {seed};
  }
  double num_accepted = 0, num_rows_after_stop = 0;
  for (const uint32_t seed : seeds) {
    const Variant variant = draw_variant(seed);
    Task& task = tasks()[variant.task];
    SCOPED_TRACE(fmt::format("ROLLPACK_SEED={}: {} of {}, {}", seed, task.requests.name,
                             task.model.name, variant.text()));
    if (task.hash == 0) {
      ASSERT_NO_FATAL_FAILURE(define(task));
    }
    for (const Output& output : run(variant, task)) {
      ASSERT_EQ(output.hash(), task.hash) << "first: " << first_difference(output, task.alone);
      num_accepted += output.num_accepted_tokens;
      num_rows_after_stop += output.num_rows_after_stop;
    }
  }
  EXPECT_TRUE(num_accepted > 0 || seeds.size() < 100) << "no draft came true: they prove nothing";
  EXPECT_TRUE(num_rows_after_stop > 0 || seeds.size() < 100)
      << "no step was planned ahead of a stop";
  // All nine tasks alone take longer than six configurations, for a hash that other machines print.
  if (kIsSanitized) return;
  std::string hashes;
  for (Task& task : tasks()) {
    if (task.hash == 0) {
      ASSERT_NO_FATAL_FAILURE(define(task));
    }
    hashes += fmt::format("{:016x}", task.hash);
  }
  std::cout << fmt::format("{} configurations, one hash: {:016x}\n", seeds.size(), fnv1a64(hashes));
}

INSTANTIATE_TEST_SUITE_P(Seeds, EveryConfiguration, ::testing::Range(0, kNumShards),
                         [](const auto& info) { return "shard_" + std::to_string(info.param); });

}  // namespace
}  // namespace rollpack::rollout
