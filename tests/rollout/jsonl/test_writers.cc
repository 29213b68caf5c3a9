#include "rollout/jsonl/writers.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "rollout/jsonl/strict_json.h"
#include "tests/error_text.h"

namespace rollpack::rollout {
namespace {

using testing::error_text;

bridge::Sample two_token_sample() {
  bridge::Sample sample;
  sample.key.prompt_id = {.text = "gsm8k-0"};
  sample.key.sample_index = 3;
  sample.response_ids = {11, 2};
  sample.logprobs = {-0.1f, -2.5f};
  sample.scaled_logprobs = {-1e-8f, -0.0f};
  sample.support_logmass = {0.0f, -0.25f};
  sample.finish_reason = bridge::FinishReason::kStop;
  sample.stop_token_id = 2;
  sample.weight_versions = {{0, 5}};
  return sample;
}

TEST(Writers, SampleLineHasItsKeysInOrderAndShortestFloats) {
  EXPECT_EQ(sample_line(two_token_sample()),
            R"({"prompt_id":"gsm8k-0","sample_index":3,"response_ids":[11,2],)"
            R"("logprobs":[-0.1,-2.5],"scaled_logprobs":[-1e-08,-0],"support_logmass":[0,-0.25],)"
            R"("finish_reason":"stop","stop_token_id":2,"weight_version":5,)"
            R"("cumulative_logprob":-2.6})"
            "\n");
}

TEST(Writers, IntegerIdsStayIntegersAndTextIsEscaped) {
  bridge::Sample sample = two_token_sample();
  sample.key.prompt_id = {.text = "7", .is_integer = true};
  EXPECT_EQ(sample_line(sample).substr(0, 16), "{\"prompt_id\":7,\"");
  sample.key.prompt_id = {.text = "a\"\n\xC3\xA9"};
  EXPECT_EQ(sample_line(sample).substr(0, 24), "{\"prompt_id\":\"a\\\"\\n\xC3\xA9\",\"");
}

TEST(Writers, WeightVersionsAreListedOnlyWhereThereWereSeveral) {
  bridge::Sample sample = two_token_sample();
  sample.weight_versions = {{0, 5}, {1, 6}};
  EXPECT_NE(sample_line(sample).find(R"("weight_version":5,"weight_versions":[[0,5],[1,6]],)"),
            std::string::npos);
}

TEST(Writers, AnEmptyResponseHasNoVersion) {
  bridge::Sample sample;
  sample.key.prompt_id = {.text = "0", .is_integer = true};
  sample.finish_reason = bridge::FinishReason::kAbort;
  EXPECT_EQ(sample_line(sample),
            R"({"prompt_id":0,"sample_index":0,"response_ids":[],"logprobs":[],)"
            R"("scaled_logprobs":[],"support_logmass":[],"finish_reason":"abort",)"
            R"("stop_token_id":-1,"weight_version":-1,"cumulative_logprob":0})"
            "\n");
}

TEST(Writers, FloatsReadBackToTheSameBits) {
  bridge::Sample sample = two_token_sample();
  const std::vector<float> values = {-1.0f / 3, -std::numeric_limits<float>::max(),
                                     -std::numeric_limits<float>::denorm_min(), -16777217.0f,
                                     -1.17549435e-38f};
  sample.response_ids.own().assign(values.size(), 1);
  sample.logprobs = sample.scaled_logprobs = sample.support_logmass = values;
  const Json line = Json::parse(sample_line(sample));
  for (size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(static_cast<float>(line["logprobs"][i].get<double>()), values[i]);
  }
}

TEST(Writers, WhatIsNotFiniteIsAnErrorNamingSampleAndToken) {
  bridge::Sample sample = two_token_sample();
  sample.scaled_logprobs.own()[1] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(error_text([&] { sample_line(sample); }),
            "non_finite: scaled_logprobs[1] = nan (prompt_id gsm8k-0, sample 3): expected a finite "
            "number");
}

TEST(Writers, AColumnOfAnotherLengthIsABrokenInvariant) {
  bridge::Sample sample = two_token_sample();
  sample.support_logmass.own().pop_back();
  EXPECT_EQ(error_text([&] { sample_line(sample); }),
            "internal: support_logmass of prompt_id gsm8k-0, sample 3 has 1 entries for 2 tokens");
}

TEST(Writers, FailedLineHoldsTheWholeError) {
  bridge::FailedSample failed;
  failed.key.prompt_id = {.text = "x"};
  failed.key.sample_index = 1;
  failed.error = {.code = ErrorCode::kInvalidArgument,
                  .field = "input_ids[3]",
                  .value = "\xFF",
                  .origin = "p.jsonl:4",
                  .allowed = "less than 100",
                  .message = "out of the vocabulary"};
  EXPECT_EQ(failed_line(failed),
            R"({"prompt_id":"x","sample_index":1,"error":{"code":"invalid_argument",)"
            "\"field\":\"input_ids[3]\",\"value\":\"\xEF\xBF\xBD\",\"origin\":\"p.jsonl:4\","
            "\"allowed\":\"less than 100\",\"message\":\"out of the vocabulary\"}}\n");
}

TEST(Writers, ScoredLineHasItsThreeColumns) {
  bridge::ScoredSequence scored;
  scored.id = {.text = "4", .is_integer = true};
  scored.logprobs = {-1.0f};
  scored.scaled_logprobs = {-0.5f};
  scored.entropy = {2.25f};
  EXPECT_EQ(scored_line(scored),
            "{\"id\":4,\"logprobs\":[-1],\"scaled_logprobs\":[-0.5],\"entropy\":[2.25]}\n");
}

}  // namespace
}  // namespace rollpack::rollout
