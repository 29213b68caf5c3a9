// What holds for every layout: frame, checksum, errors, and that nothing but the samples decides
// the bytes.
#include "trainer_bridge/layout/batch_layout.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/error_text.h"
#include "tests/trainer_bridge/layout/example_samples.h"
#include "tests/trainer_bridge/layout/written_batch.h"

namespace rollpack::bridge {
namespace {

using rollpack::testing::error_text;
using namespace testing;

class EveryLayout : public ::testing::TestWithParam<const char*> {
 protected:
  LayoutOptions options() const {
    return {.layout = GetParam(), .max_tokens_per_row = 32, .pad_token_id = kPadId};
  }
  std::string error_of(const LayoutOptions& options, const std::vector<Sample>& samples) const {
    return error_text([&] { write_batch(*make_layout(options), pointers_to(samples)); });
  }
  static std::vector<Sample> one_sample() {
    std::vector<Sample> samples = example_samples(1, 1, false);
    samples[0].response_ids = {5, 2};
    samples[0].logprobs = samples[0].scaled_logprobs = samples[0].support_logmass = {-1, -2};
    samples[0].weight_versions = {{0, 7}};
    return samples;
  }
};

INSTANTIATE_TEST_SUITE_P(Layouts, EveryLayout, ::testing::Values("packed", "padded"),
                         [](const auto& layout) { return std::string(layout.param); });

TEST_P(EveryLayout, HeaderCarriesSequenceGenerationBytesAndChecksum) {
  const std::vector<Sample> samples = example_samples(9, 1, false);
  const WrittenBatch written =
      write_batch(*make_layout(options()), pointers_to(samples), 0x1234567890, 77);
  const ReadBatch batch = read_batch(written.bytes);
  EXPECT_EQ(batch.batch_seq, 0x1234567890u);
  EXPECT_EQ(batch.generation, 77u);
  EXPECT_EQ(batch.bytes, written.bytes.size());
  EXPECT_EQ(batch.crc32, written.crc32);
}

// CRC-32 bit by bit, as its definition has it.
uint32_t plain_crc32(std::span<const std::byte> bytes) {
  uint32_t crc = 0xffffffffu;
  for (const std::byte byte : bytes) {
    crc ^= std::to_integer<uint32_t>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ ((crc & 1) != 0 ? 0xedb88320u : 0);
  }
  return ~crc;
}

TEST_P(EveryLayout, ChecksumIsOfAllBytesBehindTheHeader) {
  const std::vector<Sample> samples = example_samples(7, 2, false);
  WrittenBatch written = write_batch(*make_layout(options()), pointers_to(samples));
  const std::span<std::byte> body = std::span(written.bytes).subspan(64);
  EXPECT_EQ(plain_crc32(body), written.crc32);
  for (const size_t at : {size_t{0}, body.size() / 2, body.size() - 1}) {
    body[at] ^= std::byte{1};
    EXPECT_NE(plain_crc32(body), written.crc32) << "byte " << at;
    body[at] ^= std::byte{1};
  }
}

TEST_P(EveryLayout, TheSameSamplesGiveTheSameBytesWhateverTheSlotHeldBefore) {
  const std::vector<Sample> samples = example_samples(20, 3, false);
  const std::vector<const Sample*> pointers = pointers_to(samples);
  const std::unique_ptr<BatchLayout> layout = make_layout(options());
  const WrittenBatch first = write_batch(*layout, pointers, 4, 5);
  TestSlot slot(first.bytes.size());
  std::fill(slot.bytes().begin(), slot.bytes().end(), std::byte{0});
  uint32_t crc32 = 0;
  layout->write(pointers, 4, 5, slot.bytes(), crc32);
  EXPECT_TRUE(std::equal(first.bytes.begin(), first.bytes.end(), slot.bytes().begin()));
  EXPECT_EQ(crc32, first.crc32);
}

TEST_P(EveryLayout, ABatchWithoutSamplesIsABatch) {
  const ReadBatch batch = write_and_read(options(), {});
  EXPECT_EQ(batch.column("request_id").shape, std::vector<uint64_t>{0});
  EXPECT_EQ(batch.values<int32_t>("prompt_id_starts"), std::vector<int32_t>{0});
}

TEST_P(EveryLayout, LogprobsModeChoosesRolloutLogProbs) {
  const std::vector<Sample> samples = [] {
    std::vector<Sample> one = one_sample();
    one[0].logprobs = {-1.5f, -2.5f};
    one[0].scaled_logprobs = {-3, -4};
    one[0].support_logmass = {-0.5f, 0};
    return one;
  }();
  LayoutOptions options = this->options();
  const size_t num_prompt = options.layout == "packed" ? samples[0].prompt_ids->size() : 0;
  const auto rollout_log_probs = [&](const char* mode) {
    options.logprobs_mode = mode;
    const auto values =
        write_and_read(options, pointers_to(samples)).values<float>("rollout_log_probs");
    return std::vector<float>(values.begin() + static_cast<int64_t>(num_prompt), values.end());
  };
  EXPECT_EQ(rollout_log_probs("processed_logprobs"), (std::vector<float>{-2.5f, -4}));
  EXPECT_EQ(rollout_log_probs("raw_logprobs"), (std::vector<float>{-1.5f, -2.5f}));
}

TEST_P(EveryLayout, OptionalColumnsStandBehindRolloutLogProbsInOneOrder) {
  LayoutOptions options = this->options();
  options.columns = {"entropy", "support_logmass", "logprobs", "scaled_logprobs"};
  const std::vector<Sample> samples = example_samples(4, 5, true);
  const ReadBatch batch = write_and_read(options, pointers_to(samples));
  const auto at = std::find(batch.names.begin(), batch.names.end(), "rollout_log_probs");
  EXPECT_EQ(
      std::vector<std::string>(at + 1, at + 5),
      (std::vector<std::string>{"logprobs", "scaled_logprobs", "support_logmass", "entropy"}));
  for (auto name = at; name != at + 5; ++name) {
    EXPECT_EQ(batch.column(*name).shape, batch.column("rollout_log_probs").shape) << *name;
    EXPECT_EQ(batch.column(*name).alignment, 1u) << *name;
  }
}

TEST_P(EveryLayout, SlotErrorNamesTheBytesOfSlotAndBatch) {
  const std::vector<Sample> samples = example_samples(3, 6, false);
  const std::unique_ptr<BatchLayout> layout = make_layout(options());
  const int64_t bytes = layout->batch_bytes(pointers_to(samples));
  TestSlot slot(static_cast<size_t>(bytes - 1));
  uint32_t crc32 = 0;
  EXPECT_EQ(error_text([&] { layout->write(pointers_to(samples), 1, 1, slot.bytes(), crc32); }),
            "resource_exhausted: bridge.slot_bytes = " + std::to_string(bytes - 1) + ": expected " +
                std::to_string(bytes) + " or more, the bytes of the batch");
  EXPECT_EQ(slot.bytes()[0], kDirt);
}

TEST_P(EveryLayout, EntropyColumnWithoutEntropyNamesTheSample) {
  LayoutOptions options = this->options();
  options.columns = {"entropy"};
  EXPECT_EQ(error_of(options, one_sample()),
            "failed_precondition: bridge.columns = entropy (request 1099511627776, prompt 0 (0), "
            "sample 0): expected columns the engine computes; the sample was made without entropy");
}

TEST_P(EveryLayout, EmptyResponseNeedsNoEntropy) {
  LayoutOptions options = this->options();
  options.columns = {"entropy"};
  std::vector<Sample> samples = example_samples(3, 1, true);
  ASSERT_TRUE(samples[2].response_ids.empty() && samples[2].entropy.empty());
  EXPECT_EQ(error_of(options, samples), "no error");
}

TEST_P(EveryLayout, SamplesAtOddsWithThemselvesAreInternalErrors) {
  const std::string name = "internal: request 1099511627776, prompt 0 (0), sample 0: ";
  std::vector<Sample> samples = one_sample();
  samples[0].logprobs = {-1};
  EXPECT_EQ(error_of(options(), samples), name + "logprobs has 1 entries, response_ids 2");
  samples = one_sample();
  samples[0].scaled_logprobs.own().push_back(-1);
  EXPECT_EQ(error_of(options(), samples), name + "scaled_logprobs has 3 entries, response_ids 2");
  samples = one_sample();
  samples[0].support_logmass.own().clear();
  EXPECT_EQ(error_of(options(), samples), name + "support_logmass has 0 entries, response_ids 2");
  samples = one_sample();
  samples[0].entropy = {1, 1, 1};
  EXPECT_EQ(error_of(options(), samples), name + "entropy has 3 entries, response_ids 2");
  samples = one_sample();
  samples[0].prompt_ids = nullptr;
  EXPECT_EQ(error_of(options(), samples), name + "prompt_ids is null");
}

TEST_P(EveryLayout, VersionSpansMustCoverTheResponseInOrder) {
  const std::string name = "request 1099511627776, prompt 0 (0), sample 0";
  std::vector<Sample> samples = one_sample();
  const auto error_for = [&](std::vector<VersionSpan> spans) {
    samples[0].weight_versions = std::move(spans);
    return error_of(options(), samples);
  };
  EXPECT_EQ(error_for({}), "internal: " + name + ": weight_versions is empty, response_ids is not");
  EXPECT_EQ(error_for({{1, 3}}),
            "internal: " + name + ": weight_versions names token 1 after token -1, of 2");
  EXPECT_EQ(error_for({{0, 3}, {0, 4}}),
            "internal: " + name + ": weight_versions names token 0 after token 0, of 2");
  EXPECT_EQ(error_for({{0, 3}, {2, 4}}),
            "internal: " + name + ": weight_versions names token 2 after token 0, of 2");
  EXPECT_EQ(error_for({{0, int64_t{1} << 31}}),
            "unsupported: weight_versions = 2147483648 (" + name +
                "): expected 0 to 2147483647, what the batch's column holds");
  EXPECT_EQ(error_for({{0, 3}, {1, 2147483647}}), "no error");
}

TEST(LayoutOptions, ErrorsNameKeyValueAndWhatIsAllowed) {
  EXPECT_EQ(error_text([] { make_layout({.layout = "ragged"}); }),
            "invalid_argument: bridge.layout = ragged: expected packed or padded");
  EXPECT_EQ(error_text([] { make_layout({.max_tokens_per_row = 0}); }),
            "invalid_argument: bridge.max_tokens_per_row = 0: expected 1 to 2147483647");
  EXPECT_EQ(error_text([] { make_layout({.pad_to_multiple_of = 0}); }),
            "invalid_argument: bridge.pad_to_multiple_of = 0: expected 1 or more");
  EXPECT_EQ(error_text([] { make_layout({.prompt_width = 12, .pad_to_multiple_of = 8}); }),
            "invalid_argument: bridge.prompt_width = 12: expected 0, or a multiple of "
            "bridge.pad_to_multiple_of = 8");
  EXPECT_EQ(error_text([] { make_layout({.response_width = -1}); }),
            "invalid_argument: bridge.response_width = -1: expected 0, or a multiple of "
            "bridge.pad_to_multiple_of = 1");
  EXPECT_EQ(error_text([] {
              make_layout({.columns = {"logprobs", "values"}});
            }),
            "invalid_argument: bridge.columns[1] = values: expected logprobs or scaled_logprobs or "
            "support_logmass or entropy or ref_log_prob");
  EXPECT_EQ(error_text([] {
              make_layout({.columns = {"entropy", "logprobs", "entropy"}});
            }),
            "invalid_argument: bridge.columns[2] = entropy: expected each column once; columns[0] "
            "is the same");
  EXPECT_EQ(error_text([] { make_layout({.logprobs_mode = "raw"}); }),
            "invalid_argument: rollout.logprobs_mode = raw: expected processed_logprobs or "
            "raw_logprobs");
  EXPECT_EQ(error_text([] { make_layout({.pad_token_id = -1}); }),
            "invalid_argument: pad_token_id = -1: expected a token id, 0 or more");
}

}  // namespace
}  // namespace rollpack::bridge
