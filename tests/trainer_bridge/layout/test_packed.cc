// The packed layout: rebuilt into the samples it was made of, row by row under the cap.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <tuple>

#include "tests/error_text.h"
#include "tests/trainer_bridge/layout/example_samples.h"
#include "tests/trainer_bridge/layout/rebuilt_samples.h"
#include "tests/trainer_bridge/layout/written_batch.h"

namespace rollpack::bridge {
namespace {

using rollpack::testing::error_text;
using namespace testing;

std::vector<float> processed(const Sample& sample) {
  std::vector<float> values = sample.scaled_logprobs;
  for (size_t t = 0; t < values.size(); ++t) values[t] -= sample.support_logmass[t];
  return values;
}

ReadBatch packed(const std::vector<Sample>& samples, int32_t max_tokens_per_row,
                 std::vector<std::string> columns = {}) {
  return write_and_read({.layout = "packed",
                         .max_tokens_per_row = max_tokens_per_row,
                         .columns = std::move(columns),
                         .pad_token_id = kPadId},
                        pointers_to(samples));
}

TEST(Packed, TableListsTheColumnsOfTheReadme) {
  const ReadBatch batch = packed(example_samples(6, 1, false), 32);
  EXPECT_EQ(batch.names,
            (std::vector<std::string>{
                "input_ids", "position_ids", "segment_ids", "cu_seqlens", "row_starts", "loss_mask",
                "weight_versions", "rollout_log_probs", "request_id", "prompt_index",
                "prompt_id_bytes", "prompt_id_starts", "sample_index", "group_size", "prompt_lens",
                "response_lens", "finish_reason", "stop_token_id", "temperature"}));
  for (const char* name : {"input_ids", "position_ids", "segment_ids", "loss_mask",
                           "weight_versions", "rollout_log_probs"}) {
    EXPECT_EQ(batch.column(name).alignment, 1u) << name;
    EXPECT_EQ(batch.column(name).shape, batch.column("input_ids").shape) << name;
  }
  for (const char* name : {"cu_seqlens", "row_starts", "prompt_lens", "temperature"}) {
    EXPECT_EQ(batch.column(name).alignment, 0u) << name;
  }
}

TEST(Packed, EverySampleIsRebuiltWhateverTheCap) {
  using Key = std::tuple<int64_t, int32_t, int32_t>;
  for (const int32_t num : {1, 2, 3, 40}) {
    for (const int32_t cap : {21, 32, 100, 16384}) {
      const std::vector<Sample> samples = example_samples(num, num + cap, true);
      const ReadBatch batch =
          packed(samples, cap, {"logprobs", "scaled_logprobs", "support_logmass", "entropy"});
      std::map<Key, RebuiltSample> rebuilt;
      for (RebuiltSample& sample : rebuild_packed(batch)) {
        const Key key = {sample.request_id, sample.prompt_index, sample.sample_index};
        EXPECT_TRUE(rebuilt.emplace(key, std::move(sample)).second);
      }
      ASSERT_EQ(rebuilt.size(), samples.size());
      for (const Sample& sample : samples) {
        const Key key = {sample.key.request_id, sample.key.prompt_index, sample.key.sample_index};
        ASSERT_TRUE(rebuilt.count(key));
        EXPECT_EQ(rebuilt[key].values.size(), 5u);
        EXPECT_EQ(rebuilt[key].weight_versions.size(), sample.response_ids.size());
        expect_same(rebuilt[key], sample, processed(sample));
      }
    }
  }
}

TEST(Packed, RowsAreWholeSamplesOfAtMostMaxTokensPerRow) {
  const std::vector<Sample> samples = example_samples(60, 4, false);
  for (const int32_t cap : {21, 22, 40, 1000}) {
    const ReadBatch batch = packed(samples, cap);
    const auto cu_seqlens = batch.values<int32_t>("cu_seqlens");
    const auto row_starts = batch.values<int32_t>("row_starts");
    ASSERT_EQ(row_starts.front(), 0);
    ASSERT_EQ(row_starts.back(), 60);
    for (size_t m = 0; m + 1 < row_starts.size(); ++m) {
      ASSERT_LT(row_starts[m], row_starts[m + 1]);
      EXPECT_LE(cu_seqlens[row_starts[m + 1]] - cu_seqlens[row_starts[m]], cap) << "row " << m;
    }
    const int32_t total = cu_seqlens.back();
    EXPECT_GE(static_cast<int32_t>(row_starts.size()) - 1, (total + cap - 1) / cap);
  }
}

TEST(Packed, SamplesThatFitOneRowKeepTheirOrder) {
  const std::vector<Sample> samples = example_samples(30, 5, false);
  const ReadBatch batch = packed(samples, 16384);
  EXPECT_EQ(batch.values<int32_t>("row_starts"), (std::vector<int32_t>{0, 30}));
  const std::vector<RebuiltSample> rebuilt = rebuild_packed(batch);
  for (size_t s = 0; s < samples.size(); ++s)
    expect_same(rebuilt[s], samples[s], processed(samples[s]));
}

TEST(Packed, APadIdInsideAResponseIsATokenLikeAnyOther) {
  std::vector<Sample> samples = example_samples(1, 1, false);
  Sample& sample = samples[0];
  sample.prompt_ids = std::make_shared<std::vector<int32_t>>(1, kPadId);
  sample.response_ids = {kPadId, 4, kPadId, kPadId};
  sample.logprobs = sample.scaled_logprobs = sample.support_logmass = {-1, -1, -1, -1};
  sample.weight_versions = {{0, 1}, {2, 9}};
  const ReadBatch batch = packed(samples, 5);
  EXPECT_EQ(batch.values<int32_t>("input_ids"),
            (std::vector<int32_t>{kPadId, kPadId, 4, kPadId, kPadId}));
  EXPECT_EQ(batch.values<uint8_t>("loss_mask"), (std::vector<uint8_t>{0, 1, 1, 1, 1}));
  EXPECT_EQ(batch.values<int32_t>("weight_versions"), (std::vector<int32_t>{-1, 1, 1, 9, 9}));
}

TEST(Packed, RowsThatTheCallerDecidedAreKept) {
  const std::vector<Sample> samples = example_samples(5, 9, false);
  const std::vector<const Sample*> pointers = pointers_to(samples);
  const std::unique_ptr<BatchLayout> layout =
      make_layout({.max_tokens_per_row = 1 << 20, .pad_token_id = kPadId});
  const std::vector<int32_t> row_starts = {0, 2, 2, 5};
  TestSlot slot(static_cast<size_t>(layout->batch_bytes(pointers, row_starts)));
  uint32_t crc32 = 0;
  layout->write(pointers, 1, 1, slot.bytes(), crc32, row_starts);
  const ReadBatch batch = read_batch(slot.bytes());
  EXPECT_EQ(batch.values<int32_t>("row_starts"), row_starts);
  for (size_t s = 0; s < samples.size(); ++s) {
    EXPECT_EQ(batch.values<int32_t>("sample_index")[s], samples[s].key.sample_index);
  }
}

TEST(Packed, RowsThatBreakTheRulesAreBrokenInvariants) {
  const std::vector<Sample> samples = example_samples(3, 9, false);
  const std::vector<const Sample*> pointers = pointers_to(samples);
  int32_t longest = 0;
  for (const Sample& sample : samples) {
    longest = std::max(
        longest, static_cast<int32_t>(sample.prompt_ids->size() + sample.response_ids.size()));
  }
  const std::unique_ptr<BatchLayout> layout =
      make_layout({.max_tokens_per_row = longest, .pad_token_id = kPadId});
  using Starts = std::vector<int32_t>;
  EXPECT_GT(layout->batch_bytes(pointers, Starts{0, 1, 2, 3}), 0);
  for (const Starts& starts : {Starts{0, 3}, Starts{0, 1, 2}, Starts{1, 2, 3}, Starts{0, 2, 1, 3},
                               Starts{0, 1, 2, 3, 4}}) {
    EXPECT_NE(error_text([&] { layout->batch_bytes(pointers, starts); }).find("internal"),
              std::string::npos);
  }
}

TEST(Packed, ASampleLongerThanARowNamesTheKeyAndItsLength) {
  std::vector<Sample> samples = example_samples(4, 1, false);
  Sample& sample = samples[3];
  sample.prompt_ids = std::make_shared<std::vector<int32_t>>(5, 1);
  sample.response_ids.own().assign(7, 1);
  sample.logprobs = sample.scaled_logprobs = sample.support_logmass = std::vector<float>(7, -1);
  sample.weight_versions = {{0, 1}};
  EXPECT_EQ(error_text([&] { packed(samples, 11); }),
            "invalid_argument: bridge.max_tokens_per_row = 11 (request 1099511627776, prompt 1 "
            "(Größe-1), sample 0): expected 12 or more, the 5 prompt and 7 response tokens of the "
            "sample; a sample is never split between rows");
  EXPECT_EQ(error_text([&] { packed(samples, 12); }), "no error");
}

}  // namespace
}  // namespace rollpack::bridge
