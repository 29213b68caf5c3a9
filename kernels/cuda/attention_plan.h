// Which block of threads does what of one step's attention: a work list made on the host, a pure
// function of the plan. How the work is cut changes no bit of any row, since the state of a chunk
// of keys is a function of (row, chunk) alone and a row merges its chunks left to right either way.
//
// An item is some query rows against some chunks of keys at one page table. A direct item holds all
// chunks of its rows, merges them as it goes and writes the rows' outputs. The others, cut so that
// few long sequences fill a device and that siblings read the chunks of a shared prefix once, store
// the state of every (row, chunk); whoever stores the last state of a row merges all of them in
// order.
// Source: Dao et al., "Flash-Decoding", 2023, for the cut over keys; Ye et al., "Cascade
// inference",
//   2024, for the shared prefix. Neither merges in a fixed order.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/step_plan.h"

namespace rollpack::kernels::cuda {

inline constexpr int32_t kChunkKeys = 256;
// Rows of the products of an item: two tiles of the MMA's 16. One query row gives as many as heads
// share a KV head.
inline constexpr int32_t kItemRows = 32;
// First state of rows without any.
inline constexpr int32_t kNoState = -1;

struct AttentionItem {
  int32_t first_row = 0;    // entries [first_row, first_row + num_rows) of item_rows
  int32_t num_rows = 0;     // query rows
  int32_t page_table = 0;   // into StepPlan::page_tables, of every row over these chunks
  int32_t begin_chunk = 0;  // chunks [begin_chunk, end_chunk)
  int32_t end_chunk = 0;
  int32_t is_direct = 0;
};

struct AttentionLimits {
  int32_t group = 1;         // H / G
  int32_t num_kv_heads = 1;  // G
  int32_t page_tokens = 16;
  int32_t max_states = 0;     // states of (row, chunk) that the device has memory for
  int32_t wanted_blocks = 1;  // that fill the device
};

struct AttentionPlan {
  std::vector<AttentionItem> items;  // those with most chunks first
  std::vector<int32_t> item_rows;    // rows of the step
  // [T] state of the row's chunk 0, chunk c's is c further; or kNoState.
  std::vector<int32_t> row_states;
  std::vector<int32_t> pad_rows;  // whose output is 0
  int32_t num_states = 0;
};

// Query rows of an item.
inline int32_t query_rows_per_item(int32_t group) {
  return group >= kItemRows ? 1 : kItemRows / group;
}

// Blocks, for every KV head, that a graph of steps of `rows` rows gives to items, whose number is
// read on the device: one a row, as items are where there are many rows, or twice as many as fill
// the device, where few long rows are cut into up to `max_states` more. Blocks without an item end
// at once.
inline int32_t graph_item_blocks(int32_t rows, const AttentionLimits& limits) {
  const int32_t enough = (2 * limits.wanted_blocks + limits.num_kv_heads - 1) / limits.num_kv_heads;
  const int32_t most = rows + limits.max_states;
  const int32_t blocks = rows > enough ? rows : enough;
  return blocks < most ? blocks : most;
}

// One plan serves every layer of the step: a layer with a window skips the chunks that it hides.
AttentionPlan plan_attention(const StepPlan& plan, const AttentionLimits& limits);

}  // namespace rollpack::kernels::cuda
