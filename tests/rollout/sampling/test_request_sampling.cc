#include "rollout/sampling/request_sampling.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "tests/error_text.h"

namespace rollpack::rollout {
namespace {

using Ids = std::vector<int32_t>;

const Ids kEos = {2, 50};
constexpr int64_t kVocabSize = 100;

RequestSampling resolve(const RolloutSection& defaults,
                        const bridge::SamplingOverrides& overrides = {}) {
  return resolve_sampling(defaults, overrides, kEos, kVocabSize, "p.jsonl:4");
}

std::string error_of(const bridge::SamplingOverrides& overrides) {
  return testing::error_text([&] { resolve({}, overrides); });
}

TEST(RequestSampling, DefaultsAreNeutralAndStopAtEos) {
  const RequestSampling sampling = resolve({});
  EXPECT_EQ(sampling.params.temperature, 1.0f);
  EXPECT_EQ(sampling.params.top_k, 0);
  EXPECT_EQ(sampling.params.top_p, 1.0f);
  EXPECT_EQ(sampling.params.min_p, 0.0f);
  EXPECT_EQ(sampling.seed, 0u);
  EXPECT_EQ(sampling.response_length, 256);
  EXPECT_EQ(sampling.min_tokens, 0);
  EXPECT_EQ(sampling.stop_token_ids, kEos);
}

TEST(RequestSampling, OverridesWinKeyByKey) {
  RolloutSection defaults;
  defaults.temperature = 0.5;
  defaults.top_k = 10;
  defaults.seed = 7;
  bridge::SamplingOverrides overrides;
  overrides.top_k = 3;
  overrides.top_p = 0.25f;
  overrides.response_length = 9;
  overrides.min_tokens = 9;
  const RequestSampling sampling = resolve(defaults, overrides);
  EXPECT_EQ(sampling.params.temperature, 0.5f);
  EXPECT_EQ(sampling.params.top_k, 3);
  EXPECT_EQ(sampling.params.top_p, 0.25f);
  EXPECT_EQ(sampling.seed, 7u);
  EXPECT_EQ(sampling.response_length, 9);
  EXPECT_EQ(sampling.min_tokens, 9);
}

TEST(RequestSampling, TopKOffIsZeroForTheKernels) {
  for (const int32_t off : {-1, 0}) {
    RolloutSection defaults;
    defaults.top_k = 10;
    bridge::SamplingOverrides overrides;
    overrides.top_k = off;
    EXPECT_EQ(resolve(defaults, overrides).params.top_k, 0);
  }
}

TEST(RequestSampling, StopTokensAreSortedUniqueAndJoinedByEos) {
  RolloutSection defaults;
  defaults.stop_token_ids = {99, 2, 7, 7};
  EXPECT_EQ(resolve(defaults).stop_token_ids, (Ids{2, 7, 50, 99}));

  bridge::SamplingOverrides overrides;  // replaces the configured list, not EOS
  overrides.stop_token_ids = Ids{3};
  EXPECT_EQ(resolve(defaults, overrides).stop_token_ids, (Ids{2, 3, 50}));
  overrides.ignore_eos = true;
  EXPECT_EQ(resolve(defaults, overrides).stop_token_ids, (Ids{3}));
  overrides.stop_token_ids = Ids{2};  // asked for by name: kept though EOS is ignored
  EXPECT_EQ(resolve(defaults, overrides).stop_token_ids, (Ids{2}));

  defaults.ignore_eos = true;
  EXPECT_EQ(resolve(defaults, {.ignore_eos = false}).stop_token_ids, (Ids{2, 7, 50, 99}));
}

TEST(RequestSampling, TheSmallestTemperatureIsAllowedInDecimal) {
  EXPECT_EQ(resolve({}, {.temperature = 1e-5f}).params.temperature, 1e-5f);
  EXPECT_EQ(resolve({}, {.temperature = 0.0f}).params.temperature, 0.0f);
  RolloutSection defaults;
  defaults.temperature = 1e-5;
  EXPECT_EQ(resolve(defaults).params.temperature, 1e-5f);
}

TEST(RequestSampling, BadOverridesNameKeyValueOriginAndWhatIsAllowed) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::string temperature = " (p.jsonl:4): expected 0 (greedy) or a number from 1e-5 to 1e5";
  const std::string top_p = " (p.jsonl:4): expected a number above 0, at most 1";
  const std::string min_p = " (p.jsonl:4): expected a number from 0 to 1";
  const std::string vocabulary =
      " (p.jsonl:4): expected token ids from 0 to 99, the model's vocabulary";
  const std::vector<std::pair<bridge::SamplingOverrides, std::string>> cases = {
      {{.temperature = kNan}, "temperature = nan" + temperature},
      {{.temperature = -1.0f}, "temperature = -1" + temperature},
      {{.temperature = kInfinity}, "temperature = inf" + temperature},
      {{.temperature = 1e-6f}, "temperature = 1e-06" + temperature},
      {{.top_k = -2}, "top_k = -2 (p.jsonl:4): expected a positive integer, or -1 or 0 for off"},
      {{.top_p = 0.0f}, "top_p = 0" + top_p},
      {{.top_p = 1.5f}, "top_p = 1.5" + top_p},
      {{.top_p = kNan}, "top_p = nan" + top_p},
      {{.min_p = -0.5f}, "min_p = -0.5" + min_p},
      {{.min_p = 2.0f}, "min_p = 2" + min_p},
      {{.min_p = kNan}, "min_p = nan" + min_p},
      {{.response_length = 0},
       "response_length = 0 (p.jsonl:4): expected an integer from 1 to 16777216"},
      {{.response_length = 2000000000},
       "response_length = 2000000000 (p.jsonl:4): expected an integer from 1 to 16777216"},
      {{.min_tokens = -1},
       "min_tokens = -1 (p.jsonl:4): expected an integer from 0 to the response_length of 256"},
      {{.response_length = 8, .min_tokens = 9},
       "min_tokens = 9 (p.jsonl:4): expected an integer from 0 to the response_length of 8"},
      {{.stop_token_ids = Ids{1, 100}}, "stop_token_ids = [.., 100, ..]" + vocabulary},
      {{.stop_token_ids = Ids{-1}}, "stop_token_ids = [.., -1, ..]" + vocabulary},
      {{.stop_token_ids = Ids(1000000, 1)},
       "stop_token_ids = a list of 1000000 (p.jsonl:4): expected at most 1024 ids"},
      {{.stop_token_ids = Ids(1025, 1)},
       "stop_token_ids = a list of 1025 (p.jsonl:4): expected at most 1024 ids"},
  };
  for (const auto& [overrides, error] : cases) {
    EXPECT_EQ(error_of(overrides), "invalid_argument: sampling." + error);
  }
}

// The same rule, but the configuration is to blame.
TEST(RequestSampling, ABadDefaultIsNamedAsTheConfigurationsOwn) {
  RolloutSection defaults;
  defaults.min_tokens = 20;
  EXPECT_EQ(
      testing::error_text([&] { resolve(defaults, {.response_length = 10}); }),
      "invalid_argument: rollout.min_tokens = 20 (p.jsonl:4): expected an integer from 0 to the "
      "response_length of 10");
  defaults = {};
  defaults.stop_token_ids = {100};
  EXPECT_EQ(
      testing::error_text([&] { resolve(defaults); }),
      "invalid_argument: rollout.stop_token_ids = [.., 100, ..] (p.jsonl:4): expected token ids "
      "from 0 to 99, the model's vocabulary");
}

}  // namespace
}  // namespace rollpack::rollout
