// The work list of attention: whatever the rows, every one meets every chunk that it sees once.
#include "kernels/cuda/attention_plan.h"

#include <map>
#include <set>

#include "tests/kernels/rig.h"

namespace rollpack::kernels::cuda {
namespace {

using testing::Numbers;
using testing::page_range;

// Sequences of one to 40 rows at any position, some of them siblings of the one before.
StepPlan random_plan(Numbers& numbers) {
  StepPlan plan;
  std::vector<int32_t> pages;
  int32_t next_page = 0;
  for (int32_t s = numbers.below(12); s >= 0; --s) {
    const int32_t rows = numbers.below(3) == 0 ? 1 + numbers.below(40) : 1;
    const int32_t first = numbers.below(1500);
    const int32_t count = (first + rows + 15) / 16;
    const int32_t shared =
        numbers.below(2) == 0 ? 0 : std::min(static_cast<int32_t>(pages.size()), first / 16);
    pages.resize(static_cast<size_t>(shared));
    for (int32_t p = shared; p < count; ++p) pages.push_back(next_page++);
    testing::add_sequence(plan, std::vector<int32_t>(static_cast<size_t>(rows), 0), first, pages);
    if (numbers.below(8) == 0) plan.positions.back() = kPadPosition;
  }
  return plan;
}

struct Seen {
  std::map<std::pair<int32_t, int32_t>, int32_t> items;  // (row, chunk): how many items have it
  std::set<int32_t> states;
};

std::span<const int32_t> chunk_pages(const StepPlan& plan, int32_t table, int32_t begin,
                                     int32_t end) {
  return std::span(plan.page_tables)
      .subspan(static_cast<size_t>(table + begin / 16),
               static_cast<size_t>((end - begin + 15) / 16));
}

void expect_whole(const StepPlan& plan, const AttentionLimits& limits) {
  const AttentionPlan work = plan_attention(plan, limits);
  std::vector<int32_t> table_of_row(plan.positions.size());
  for (const StepSequence& sequence : plan.sequences) {
    std::fill_n(table_of_row.begin() + sequence.row_begin, sequence.num_rows,
                sequence.page_table_begin);
  }
  Seen seen;
  for (const AttentionItem& item : work.items) {
    ASSERT_LE(item.num_rows, query_rows_per_item(limits.group));
    ASSERT_LT(item.begin_chunk, item.end_chunk);
    for (int32_t i = item.first_row; i < item.first_row + item.num_rows; ++i) {
      const int32_t row = work.item_rows[static_cast<size_t>(i)];
      const int32_t position = plan.positions[static_cast<size_t>(row)];
      ASSERT_NE(position, kPadPosition);
      const bool is_stored = work.row_states[static_cast<size_t>(row)] != kNoState;
      ASSERT_EQ(is_stored, item.is_direct == 0) << "row " << row;
      for (int32_t chunk = item.begin_chunk; chunk < item.end_chunk; ++chunk) {
        if (chunk * kChunkKeys > position) continue;  // a tile's later rows see it
        ++seen.items[{row, chunk}];
        const int32_t end = std::min((chunk + 1) * kChunkKeys, position + 1);
        ASSERT_TRUE(std::ranges::equal(
            chunk_pages(plan, item.page_table, chunk * kChunkKeys, end),
            chunk_pages(plan, table_of_row[static_cast<size_t>(row)], chunk * kChunkKeys, end)));
      }
    }
  }
  const std::set<int32_t> pads(work.pad_rows.begin(), work.pad_rows.end());
  ASSERT_EQ(pads.size(), work.pad_rows.size());
  for (size_t row = 0; row < plan.positions.size(); ++row) {
    const int32_t position = plan.positions[row], first_state = work.row_states[row];
    ASSERT_EQ(pads.contains(static_cast<int32_t>(row)), position == kPadPosition);
    for (int32_t chunk = 0; first_state != kNoState && chunk <= position / kChunkKeys; ++chunk) {
      ASSERT_TRUE(seen.states.insert(first_state + chunk).second);
      ASSERT_LT(first_state + chunk, limits.max_states);
    }
    for (int32_t chunk = 0; position >= 0 && chunk <= position / kChunkKeys; ++chunk) {
      ASSERT_EQ((seen.items[{static_cast<int32_t>(row), chunk}]), 1) << row << ", " << chunk;
    }
  }
}

TEST(AttentionPlan, EveryRowMeetsEveryChunkItSeesOnce) {
  Numbers numbers(31);
  for (int32_t i = 0; i < 300; ++i) {
    const StepPlan plan = random_plan(numbers);
    const AttentionLimits limits = {.group = 1 + numbers.below(9) * numbers.below(9),
                                    .num_kv_heads = 1 + numbers.below(8),
                                    .max_states = numbers.below(3) * numbers.below(100),
                                    .wanted_blocks = 1 + numbers.below(300)};
    ASSERT_NO_FATAL_FAILURE(expect_whole(plan, limits)) << "plan " << i;
  }
}

StepPlan siblings(int32_t count, int32_t shared_pages, int32_t position) {
  StepPlan plan;
  for (int32_t s = 0; s < count; ++s) {
    std::vector<int32_t> pages = page_range(0, shared_pages);
    for (int32_t p = shared_pages; p * 16 <= position; ++p) pages.push_back(1000 * (s + 1) + p);
    testing::add_sequence(plan, {0}, position, pages);
  }
  return plan;
}

TEST(AttentionPlan, SiblingsReadTheChunksTheyShareOnce) {
  // Two whole chunks are shared, and a page of the third.
  const AttentionPlan work =
      plan_attention(siblings(8, 33, 700), {.group = 4, .max_states = 100, .wanted_blocks = 1});
  int32_t num_shared = 0, num_own = 0;
  for (const AttentionItem& item : work.items) {
    (item.num_rows == 8 ? num_shared : num_own) += 1;
    EXPECT_EQ(item.begin_chunk < 2, item.num_rows == 8);
  }
  EXPECT_EQ(num_shared, 2);
  EXPECT_EQ(num_own, 8);
}

TEST(AttentionPlan, ALoneLongRowIsCutToFillTheDevice) {
  const StepPlan plan = siblings(1, 0, 256 * 40 - 1);
  EXPECT_EQ(plan_attention(plan, {.max_states = 100, .wanted_blocks = 264}).items.size(), 40u);
  // Without memory for its states it goes on as it is.
  EXPECT_EQ(plan_attention(plan, {.max_states = 39, .wanted_blocks = 264}).items.size(), 1u);
}

}  // namespace
}  // namespace rollpack::kernels::cuda
