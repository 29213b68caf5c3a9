// What a batch holds is the same from either layout, and columns at odds with each other are found.
#include "trainer_bridge/inspection/batch_contents.h"

#include <gtest/gtest.h>

#include "tests/error_text.h"
#include "tests/trainer_bridge/inspection/hand_made_batch.h"
#include "tests/trainer_bridge/layout/example_samples.h"
#include "tests/trainer_bridge/layout/written_batch.h"

namespace rollpack::bridge {
namespace {

using namespace testing;
using rollpack::testing::error_text;

BatchContents contents_of(const std::vector<HandColumn>& columns) {
  const std::vector<std::byte> bytes = batch_bytes(columns);
  return read_batch_contents(read_batch_table(bytes, "F"));
}

std::string error_in(std::vector<HandColumn> columns, const std::string& name, HandColumn changed) {
  column_of(columns, name) = std::move(changed);
  return error_text([&] { contents_of(columns); });
}

template <class T>
std::string error_at(std::vector<HandColumn> columns, const std::string& name, size_t i, T value) {
  put(column_of(columns, name).bytes, i * sizeof(T), value);
  return error_text([&] { contents_of(columns); });
}

TEST(BatchContents, PackedRowsSamplesAndLoss) {
  const BatchContents contents = contents_of(packed_columns());
  EXPECT_TRUE(contents.is_packed);
  ASSERT_EQ(contents.samples.size(), 3u);
  EXPECT_EQ(contents.samples[1].begin, 5);
  EXPECT_EQ(contents.samples[2].prompt_id, "b<");
  EXPECT_EQ(contents.samples[0].first_version, 4);
  EXPECT_EQ(contents.samples[0].last_version, 5);
  EXPECT_EQ(contents.samples[0].mean_logprob, -2.0);
  EXPECT_FALSE(contents.samples[2].mean_logprob);
  ASSERT_EQ(contents.rows.size(), 2u);
  EXPECT_EQ(contents.rows[0].width, 8);
  EXPECT_EQ(contents.rows[0].loss_runs, (std::vector<TokenRun>{{2, 5}, {6, 8}}));
  EXPECT_TRUE(contents.rows[1].loss_runs.empty());
  EXPECT_EQ(contents.num_groups, 2);
  EXPECT_EQ(contents.num_tokens(), 12);
  EXPECT_EQ(contents.num_loss_tokens, 5);
  EXPECT_EQ(contents.num_pads, 0);
  EXPECT_EQ(contents.num_padded_cells(), 21);
}

TEST(BatchContents, PaddedRowsCountTheirPads) {
  const BatchContents contents = contents_of(padded_columns());
  EXPECT_FALSE(contents.is_packed);
  ASSERT_EQ(contents.rows.size(), 3u);
  EXPECT_EQ(contents.samples[0].begin, 2);
  EXPECT_EQ(contents.rows[1].loss_runs, (std::vector<TokenRun>{{4, 6}}));
  EXPECT_EQ(contents.num_tokens(), 12);
  EXPECT_EQ(contents.num_loss_tokens, 5);
  EXPECT_EQ(contents.num_pads, 9);
}

// Written by the code that serves trainers, with its edge cases.
TEST(BatchContents, WhatTheLayoutsWriteIsFreeOfContradictions) {
  for (const char* layout : {"packed", "padded"}) {
    for (const int num : {0, 1, 40}) {
      const std::vector<Sample> samples = example_samples(num, 3, true);
      const LayoutOptions options{.layout = layout, .max_tokens_per_row = 64, .pad_token_id = 2};
      const WrittenBatch written = write_batch(*make_layout(options), pointers_to(samples));
      const BatchContents contents = read_batch_contents(read_batch_table(written.bytes, "F"));
      EXPECT_EQ(contents.samples.size(), samples.size());
      EXPECT_EQ(contents.num_loss_tokens, contents.num_response_tokens);
      EXPECT_EQ(contents.num_non_finite, 0);
    }
  }
}

TEST(BatchContents, NonFiniteLogprobsInTheLossAreCounted) {
  std::vector<HandColumn> columns = packed_columns();
  put(column_of(columns, "rollout_log_probs").bytes, 2 * 4, std::numeric_limits<float>::infinity());
  EXPECT_EQ(contents_of(columns).num_non_finite, 1);
}

TEST(BatchContents, StartsMustRiseFromZeroToTheirTotal) {
  EXPECT_EQ(error_at(packed_columns(), "cu_seqlens", 0, 1),
            "data_loss: cu_seqlens[0] = 1 (F): expected 0");
  EXPECT_EQ(error_at(packed_columns(), "cu_seqlens", 2, 3),
            "data_loss: cu_seqlens[2] = 3 (F): expected 5 or more, the entry before");
  EXPECT_EQ(error_at(packed_columns(), "cu_seqlens", 3, 1 << 30),
            "data_loss: cu_seqlens[3] = 1073741824 (F): expected 12, the tokens of input_ids");
  EXPECT_EQ(error_at(packed_columns(), "row_starts", 1, -1),
            "data_loss: row_starts[1] = -1 (F): expected 0 or more, the entry before");
  EXPECT_EQ(error_at(packed_columns(), "row_starts", 2, 4),
            "data_loss: row_starts[2] = 4 (F): expected 3, the number of samples");
  EXPECT_EQ(error_at(packed_columns(), "prompt_id_starts", 3, 5),
            "data_loss: prompt_id_starts[3] = 5 (F): expected 4, the entries of prompt_id_bytes");
  EXPECT_EQ(error_in(packed_columns(), "row_starts", i32_column("row_starts", {})),
            "data_loss: column row_starts: shape[0] = 0 (F): expected 1, at least a first entry 0");
}

TEST(BatchContents, ColumnsMustAgreeWithEachOther) {
  EXPECT_EQ(error_at(packed_columns(), "prompt_lens", 0, 3),
            "data_loss: cu_seqlens[1] = 5 (F): expected 6, by prompt_lens and response_lens");
  EXPECT_EQ(error_at(packed_columns(), "prompt_lens", 0, -2),
            "data_loss: prompt_lens[0] = -2 (F): expected 0 or more");
  EXPECT_EQ(error_at(packed_columns(), "position_ids", 6, 6),
            "data_loss: position_ids[6] = 6 (F): expected 1, by cu_seqlens");
  EXPECT_EQ(error_at(packed_columns(), "segment_ids", 6, 0),
            "data_loss: segment_ids[6] = 0 (F): expected 1, by cu_seqlens");
  EXPECT_EQ(error_at(packed_columns(), "loss_mask", 6, uint8_t{2}),
            "data_loss: loss_mask[6] = 2 (F): expected 0 or 1");
  EXPECT_EQ(error_at(packed_columns(), "finish_reason", 1, uint8_t{3}),
            "data_loss: finish_reason[1] = 3 (F): expected 0 (stop), 1 (length) or 2 (abort)");
  EXPECT_EQ(
      error_at(padded_columns(), "attention_mask", 0, int64_t{1}),
      "data_loss: attention_mask[0, 0] = 1 (F): expected 0, by prompt_lens and response_lens");
  EXPECT_EQ(error_at(padded_columns(), "position_ids", 13, int64_t{3}),
            "data_loss: position_ids[1, 6] = 3 (F): expected 2, by attention_mask");
  EXPECT_EQ(error_at(padded_columns(), "response_lens", 2, 4),
            "data_loss: response_lens[2] = 4 (F): expected at most 3, the columns there are");
}

// Without rows any width takes no bytes, and the sum of two may leave 64 bits.
TEST(BatchContents, WidthsOfABatchWithoutRowsAreHarmless) {
  std::vector<HandColumn> columns = padded_columns();
  for (HandColumn& column : columns) {
    column.bytes.clear();
    column.shape[0] = 0;
  }
  column_of(columns, "prompt_id_starts") = i32_column("prompt_id_starts", {0});
  column_of(columns, "prompts").shape[1] = ~uint64_t{0};
  EXPECT_EQ(error_text([&] { contents_of(columns); }),
            "data_loss: column input_ids: shape[1] = 7 (F): expected 2, by the columns of prompts "
            "and responses");
  for (const char* name : {"input_ids", "attention_mask", "position_ids"}) {
    column_of(columns, name).shape[1] = 2;
  }
  EXPECT_TRUE(contents_of(columns).rows.empty());
}

TEST(BatchContents, MissingAndMisshapenColumnsAreNamed) {
  EXPECT_EQ(error_in(packed_columns(), "segment_ids", i32_column("segments", {0})),
            "data_loss: column segment_ids = missing (F): expected <i4 with 1 dimension");
  EXPECT_EQ(error_in(packed_columns(), "segment_ids", u8_column("segment_ids", {0})),
            "data_loss: column segment_ids = |u1 [1] (F): expected <i4 with 1 dimension");
  EXPECT_EQ(error_in(packed_columns(), "segment_ids", i32_column("segment_ids", {0})),
            "data_loss: column segment_ids: shape[0] = 1 (F): expected 12, an entry a token");
  EXPECT_EQ(error_in(packed_columns(), "group_size", i32_column("request_id_2", {0})),
            "no error");  // not needed for a drawing
  EXPECT_EQ(
      error_in(padded_columns(), "prompts", hand_column<int64_t>("prompts", "<i8", {}, {3, 0})),
      "data_loss: column input_ids: shape[1] = 7 (F): expected 3, by the columns of prompts "
      "and responses");
}

}  // namespace
}  // namespace rollpack::bridge
