// The padded layout: rebuilt into the samples it was made of, pads and masks as lengths say.
#include <gtest/gtest.h>

#include <memory>

#include "kernels/base/error.h"
#include "tests/trainer_bridge/layout/example_samples.h"
#include "tests/trainer_bridge/layout/rebuilt_samples.h"
#include "tests/trainer_bridge/layout/written_batch.h"

namespace rollpack::bridge {
namespace {

using namespace testing;

ReadBatch padded(const std::vector<Sample>& samples, std::vector<std::string> columns = {},
                 int32_t pad_id = kPadId) {
  return write_and_read({.layout = "padded",
                         .columns = std::move(columns),
                         .pad_token_id = pad_id,
                         .logprobs_mode = "raw_logprobs"},
                        pointers_to(samples));
}

TEST(Padded, TableListsTheColumnsOfTheReadme) {
  const ReadBatch batch = padded(example_samples(6, 1, false));
  EXPECT_EQ(batch.names,
            (std::vector<std::string>{
                "prompts", "responses", "input_ids", "attention_mask", "position_ids",
                "response_mask", "rollout_log_probs", "request_id", "prompt_index",
                "prompt_id_bytes", "prompt_id_starts", "sample_index", "group_size", "prompt_lens",
                "response_lens", "finish_reason", "stop_token_id", "temperature"}));
  for (const char* name : {"prompts", "responses", "input_ids", "attention_mask", "position_ids",
                           "response_mask", "rollout_log_probs"}) {
    EXPECT_EQ(batch.column(name).alignment, 1u) << name;
  }
}

TEST(Padded, WidthsAreTheLongestPromptAndResponseOfTheBatch) {
  const std::vector<Sample> samples = example_samples(40, 2, false);
  uint64_t longest_prompt = 0, longest_response = 0;
  for (const Sample& sample : samples) {
    longest_prompt = std::max<uint64_t>(longest_prompt, sample.prompt_ids->size());
    longest_response = std::max<uint64_t>(longest_response, sample.response_ids.size());
  }
  const ReadBatch batch = padded(samples);
  using Shape = std::vector<uint64_t>;
  EXPECT_EQ(batch.column("prompts").shape, (Shape{40, longest_prompt}));
  EXPECT_EQ(batch.column("responses").shape, (Shape{40, longest_response}));
  EXPECT_EQ(batch.column("response_mask").shape, (Shape{40, longest_response}));
  EXPECT_EQ(batch.column("rollout_log_probs").shape, (Shape{40, longest_response}));
  for (const char* name : {"input_ids", "attention_mask", "position_ids"}) {
    EXPECT_EQ(batch.column(name).shape, (Shape{40, longest_prompt + longest_response})) << name;
  }
}

TEST(Padded, EverySampleIsRebuiltInItsOrder) {
  for (const int32_t num : {1, 2, 3, 40}) {
    const std::vector<Sample> samples = example_samples(num, 10 + num, true);
    const ReadBatch batch =
        padded(samples, {"logprobs", "scaled_logprobs", "support_logmass", "entropy"});
    const std::vector<RebuiltSample> rebuilt = rebuild_padded(batch, kPadId);
    ASSERT_EQ(rebuilt.size(), samples.size());
    for (size_t b = 0; b < samples.size(); ++b) {
      EXPECT_EQ(rebuilt[b].values.size(), 5u);
      expect_same(rebuilt[b], samples[b], samples[b].logprobs);
    }
  }
}

TEST(Padded, TheSpelledOutRowHasPadsWhereLengthsSay) {
  std::vector<Sample> samples = example_samples(2, 1, false);
  const auto set = [](Sample& sample, std::vector<int32_t> prompt, std::vector<int32_t> response) {
    sample.prompt_ids = std::make_shared<std::vector<int32_t>>(std::move(prompt));
    sample.logprobs = std::vector<float>(response.size(), -0.5f);
    sample.scaled_logprobs = sample.support_logmass = sample.logprobs;
    sample.weight_versions = {{0, 1}};
    sample.response_ids = std::move(response);
  };
  set(samples[0], {kPadId}, {5, kPadId});  // a prompt of one token, that token the pad id
  set(samples[1], {3, kPadId, 4}, {kPadId, 5, kPadId});
  const ReadBatch batch = padded(samples);
  using Row = std::vector<int64_t>;
  EXPECT_EQ(batch.values<int64_t>("input_ids"), (Row{2, 2, 2, 5, 2, 2,  //
                                                     3, 2, 4, 2, 5, 2}));
  EXPECT_EQ(batch.values<int64_t>("attention_mask"), (Row{0, 0, 1, 1, 1, 0,  //
                                                          1, 1, 1, 1, 1, 1}));
  EXPECT_EQ(batch.values<int64_t>("position_ids"), (Row{0, 0, 0, 1, 2, 2,  //
                                                        0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(batch.values<int64_t>("response_mask"), (Row{1, 1, 0,  //
                                                         1, 1, 1}));
  EXPECT_EQ(batch.values<float>("rollout_log_probs"),
            (std::vector<float>{-0.5f, -0.5f, 0, -0.5f, -0.5f, -0.5f}));
}

std::vector<uint64_t> input_shape(const LayoutOptions& options,
                                  const std::vector<Sample>& samples) {
  const ReadBatch batch = write_and_read(options, pointers_to(samples));
  const std::vector<RebuiltSample> rebuilt = rebuild_padded(batch, options.pad_token_id);
  for (size_t b = 0; b < samples.size(); ++b) {
    expect_same(rebuilt[b], samples[b], samples[b].logprobs);
  }
  return {batch.column("prompts").shape[1], batch.column("responses").shape[1]};
}

TEST(Padded, WidthsAreRoundedUpOrFixed) {
  const std::vector<Sample> samples = example_samples(8, 4, false);
  LayoutOptions options{
      .layout = "padded", .pad_token_id = kPadId, .logprobs_mode = "raw_logprobs"};
  const std::vector<uint64_t> longest = input_shape(options, samples);
  const auto rounded = [](uint64_t width, uint64_t to) { return (width + to - 1) / to * to; };
  using Widths = std::vector<uint64_t>;
  for (const int32_t multiple : {2, 7, 64}) {
    options.pad_to_multiple_of = multiple;
    EXPECT_EQ(input_shape(options, samples),
              (Widths{rounded(longest[0], multiple), rounded(longest[1], multiple)}));
  }
  options.prompt_width = 128;
  EXPECT_EQ(input_shape(options, samples), (Widths{128, rounded(longest[1], 64)}));
  options.response_width = 192;
  EXPECT_EQ(input_shape(options, samples), (Widths{128, 192}));
  options = {.layout = "padded",
             .prompt_width = static_cast<int32_t>(longest[0]),
             .response_width = static_cast<int32_t>(longest[1]),
             .pad_token_id = kPadId,
             .logprobs_mode = "raw_logprobs"};
  EXPECT_EQ(input_shape(options, samples), longest);
  EXPECT_EQ(write_and_read(options, {}).column("prompts").shape, (Widths{0, longest[0]}));
}

TEST(Padded, ASampleWiderThanAFixedWidthIsNamed) {
  std::vector<Sample> samples = example_samples(1, 5, false);
  const auto long_prompt = std::make_shared<std::vector<int32_t>>(9, 1);
  samples[0].prompt_ids = long_prompt;
  const auto make = [](int32_t prompt_width, int32_t response_width) {
    return make_layout(
        {.layout = "padded", .prompt_width = prompt_width, .response_width = response_width});
  };
  try {
    make(8, 0)->batch_bytes(pointers_to(samples));
    FAIL() << "9 tokens fit 8 columns";
  } catch (const Error& error) {
    EXPECT_EQ(error.info.code, ErrorCode::kInvalidArgument);
    EXPECT_EQ(error.info.field, "bridge.prompt_width");
    EXPECT_EQ(error.info.value, "8");
    EXPECT_NE(error.info.origin.find("sample"), std::string::npos) << error.info.origin;
    EXPECT_EQ(error.info.allowed, "9 or more, its tokens");
  }
  samples[0].prompt_ids = std::make_shared<std::vector<int32_t>>(8, 1);
  EXPECT_GT(make(8, 0)->batch_bytes(pointers_to(samples)), 0);
  const auto num_response = static_cast<int32_t>(samples[0].response_ids.size());
  ASSERT_GT(num_response, 1);
  EXPECT_GT(make(8, num_response)->batch_bytes(pointers_to(samples)), 0);
  EXPECT_THROW(make(8, num_response - 1)->batch_bytes(pointers_to(samples)), Error);
}

TEST(Padded, ThePadIdChangesPadsAndNothingElse) {
  const std::vector<Sample> samples = example_samples(12, 7, false);
  const ReadBatch with_two = padded(samples), with_99 = padded(samples, {}, 99);
  for (const std::string& name : with_two.names) {
    const bool has_ids = name == "prompts" || name == "responses" || name == "input_ids";
    if (!has_ids) {
      EXPECT_EQ(with_two.column(name).bytes, with_99.column(name).bytes) << name;
    }
  }
  rebuild_padded(with_99, 99);
}

TEST(Padded, ResponsesThatAreAllEmptyHaveNoColumns) {
  std::vector<Sample> samples = example_samples(3, 8, false);
  for (Sample& sample : samples) {
    sample.response_ids.own().clear();
    sample.logprobs = sample.scaled_logprobs = sample.support_logmass = {};
    sample.weight_versions.clear();
    sample.finish_reason = FinishReason::kAbort;
    sample.stop_token_id = -1;
  }
  const ReadBatch batch = padded(samples);
  EXPECT_EQ(batch.column("responses").shape, (std::vector<uint64_t>{3, 0}));
  const std::vector<RebuiltSample> rebuilt = rebuild_padded(batch, kPadId);
  for (size_t b = 0; b < samples.size(); ++b) expect_same(rebuilt[b], samples[b], {});
}

}  // namespace
}  // namespace rollpack::bridge
