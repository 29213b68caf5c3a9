// The head, one group of rows after the other: what is asked of them, statistics of all panels as
// logits are computed, rows from panels, draws, results. Then slots go on. Between these, where
// several ranks hold the vocabulary, they exchange statistics, logits and tokens.
#include "kernels/cuda/lm_head.h"

#include <algorithm>
#include <span>
#include <vector>

#include "kernels/cuda/head_kernels.h"
#include "kernels/cuda/launchers.h"

namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT {
namespace {

constexpr uint32_t kMaxMergeThreads = 128;

// Threads for `count` items, one each.
uint32_t whole_warps(int64_t count) {
  return static_cast<uint32_t>((count + kWarp - 1) / kWarp * kWarp);
}

// A sample or score as its slot or the plan has it.
__device__ HeadQuery read_query(const HeadWork& work, int32_t result) {
  const HeadRows& head = work.in.head;
  if (result >= head.num_samples) {
    const int32_t score = result - head.num_samples;
    const int32_t row = head.score_head_row[score];
    const float temperature = head.score_temperature[score];
    return {.row = row - work.group.first_row,
            .result = result,
            .slot = -1,
            .token = head.score_token[score],
            .position = work.in.rows.positions[head.rows[row]] + 1,
            .distribution = 0,
            .scale = temperature == 0 ? 1.0f : 1.0f / temperature,
            .is_greedy = 0,
            .is_cut = 0,
            .is_banned = 0,
            .wants_entropy = 1,
            .is_skipped = 0};
  }
  const int32_t index = head.sample_slot[result];
  if (index < 0) {
    return {.row = head.sample_head_row[result] - work.group.first_row,
            .result = result,
            .slot = -1,
            .token = -1,
            .position = -1,
            .distribution = 0,
            .scale = 1.0f,
            .is_greedy = 0,
            .is_cut = 0,
            .is_banned = 0,
            .wants_entropy = 0,
            .is_skipped = 1};
  }
  const SlotState& slot = work.in.slots.states[index];
  const int32_t position = slot.next_position + head.sample_draw[result];
  const bool is_greedy = slot.temperature == 0;
  return {.row = head.sample_head_row[result] - work.group.first_row,
          .result = result,
          .slot = index,
          .token = 0,
          .position = position,
          .distribution = 0,
          .scale = is_greedy ? 1.0f : 1.0f / slot.temperature,
          .is_greedy = is_greedy ? 1 : 0,
          .is_cut = is_cut(slot, work.V()) ? 1 : 0,
          .is_banned = position < slot.min_position && slot.num_stop_tokens > 0 ? 1 : 0,
          .wants_entropy = work.in.rows.scalars->wants_entropy,
          .is_skipped = 0};
}

// A thread a query, one block for all. Queries of a row follow each other.
__global__ void __launch_bounds__(kGroupQueries) prepare_queries(HeadWork work) {
  const HeadMemory& memory = work.memory;
  const auto q = static_cast<int32_t>(threadIdx.x);
  const bool is_used = q < work.group.num_queries;
  if (is_used) memory.queries[q] = read_query(work, work.in.queries[work.group.first_query + q]);
  if (is_used) memory.choices[q] = {0, 0.0f};
  if (q < work.group.num_rows) memory.keeps_logits[q] = 0;
  __syncthreads();
  if (!is_used) return;
  HeadQuery& query = memory.queries[q];
  if (query.is_cut != 0 || query.is_banned != 0) memory.keeps_logits[query.row] = 1;
  if (q == 0 || memory.queries[q - 1].row != query.row) memory.row_begin[query.row] = q;
  if (q + 1 == work.group.num_queries) memory.row_begin[query.row + 1] = q + 1;
  // The first query of the row at this temperature; the row's own at temperature 1.
  int32_t owner = q;
  while (owner > 0 && memory.queries[owner - 1].row == query.row) --owner;
  while (memory.queries[owner].scale != query.scale) ++owner;
  query.distribution = query.scale == 1.0f ? query.row : work.own_distribution(owner);
}

// What merge_panels does: all of it, or what comes before and after ranks exchange blocks.
enum class Merge : uint8_t { kAll, kBlocks, kRow };

__device__ BlockStats merge_block(const PanelStats* panels, int64_t count) {
  float max = -infinity_f32();
  int32_t is_finite = 1;
  for (int64_t p = 0; p < count; ++p) {
    max = fmaxf(max, panels[p].max);
    is_finite &= panels[p].is_finite;
  }
  double sum = 0, weighted = 0;
  for (int64_t p = 0; p < count; ++p) {
    const float shift = panels[p].max - max;
    const double factor = exp_f32(shift);
    sum += static_cast<double>(panels[p].sum) * factor;
    weighted += (static_cast<double>(panels[p].weighted) +
                 static_cast<double>(shift) * static_cast<double>(panels[p].sum)) *
                factor;
  }
  return {sum, weighted, max, is_finite};
}

// A block a distribution: panels to blocks of the vocabulary, a thread a block, then blocks to the
// row, all in order and in f64.
__global__ void __launch_bounds__(kMaxMergeThreads) merge_panels(HeadWork work, Merge part) {
  const HeadMemory& memory = work.memory;
  const auto index = static_cast<int32_t>(blockIdx.x);
  const int32_t q = index - work.group.num_rows;
  if (q < 0 && memory.queries[memory.row_begin[index]].is_skipped != 0) return;
  if (q >= 0 && memory.queries[q].distribution != index) return;
  const auto thread = static_cast<int64_t>(threadIdx.x);
  const int64_t num_blocks = memory.num_blocks;
  BlockStats* const blocks = memory.blocks + index * num_blocks;
  if (part != Merge::kRow) {
    const PanelStats* const panels = memory.panels + index * memory.held_panels;
    for (int64_t block = thread; block < memory.held_blocks; block += blockDim.x) {
      const int64_t begin = block * kBlockPanels, left = memory.held_panels - begin;
      blocks[memory.first_block + block] =
          merge_block(panels + begin, left < kBlockPanels ? left : kBlockPanels);
    }
    if (part == Merge::kBlocks) return;
    __syncthreads();
  }
  double* const masses = memory.block_masses + index * num_blocks;
  auto* const weighted = reinterpret_cast<double*>(dynamic_shared());  // [num_blocks]
  float max = -infinity_f32();
  int32_t is_row_finite = 1;
  for (int64_t block = 0; block < num_blocks; ++block) {
    max = fmaxf(max, blocks[block].max);
    is_row_finite &= blocks[block].is_finite;
  }
  for (int64_t block = thread; block < num_blocks; block += blockDim.x) {
    const BlockStats& of = blocks[block];
    const float shift = of.max - max;
    const double factor = exp_f32(shift);
    weighted[block] = (of.weighted + static_cast<double>(shift) * of.sum) * factor;
    masses[block] = of.sum * factor;
  }
  __syncthreads();
  if (thread != 0) return;
  double total = 0, total_weighted = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    total += masses[block];
    total_weighted += weighted[block];
  }
  memory.row_stats[index] = {total, log_f64(total), total_weighted, max, is_row_finite};
}

void merge(Stream stream, const HeadWork& work, Merge part) {
  launch(merge_panels,
         {.kernel = "merge_panels",
          .grid = {.x = static_cast<uint32_t>(work.group.num_rows + work.group.num_queries)},
          .block = std::min(whole_warps(work.memory.num_blocks), kMaxMergeThreads),
          .shared_bytes = work.memory.num_blocks * static_cast<int64_t>(sizeof(double))},
         stream, work, part);
}

// `values` [rows][columns of all ranks] of `bytes` each; a rank has `per_block` for each of its
// blocks of the vocabulary, the last one's last block fewer.
void gather_blocks(const HeadWork& work, void* values, int64_t rows, int64_t columns,
                   int64_t per_block, int64_t bytes) {
  Communicator& ranks = *work.in.ranks;
  const std::vector<int64_t> blocks = shard_starts(ranks.size(), 1, [&](ReplicaRank rank) {
    const int64_t end = vocabulary_shard(work.V(), rank).end;
    return ShardRange{0, (end + kShardVocabulary - 1) / kShardVocabulary};
  });
  std::vector<int64_t> starts;
  for (const int64_t block : blocks) {
    starts.push_back(std::min(block * per_block, columns) * bytes);
  }
  ranks.gather_columns(
      {.in = static_cast<std::byte*>(values) + starts[static_cast<size_t>(ranks.rank())],
       .in_stride = columns * bytes,
       .out = values,
       .out_stride = columns * bytes,
       .rows = rows,
       .starts = starts});
}

// Behind the statistics of the panels held.
void run_sharded_group(Stream stream, const HeadWork& work) {
  const HeadMemory& memory = work.memory;
  merge(stream, work, Merge::kBlocks);
  gather_blocks(work, memory.blocks, work.group.num_rows + work.group.num_queries,
                memory.num_blocks, 1, sizeof(BlockStats));
  merge(stream, work, Merge::kRow);
  if (work.group.may_keep_logits) {
    gather_blocks(work, memory.logits, work.group.num_rows, memory.logits_stride(),
                  kShardVocabulary, sizeof(float));
    draw_truncated(stream, work);
  }
  choose_tokens(stream, work);
  // One rank has each of them, all others zeros: the sum of their bits is the token.
  static_assert(sizeof(TokenChoice) == 2 * sizeof(uint32_t));
  work.in.ranks->all_reduce<Reduction::kSum>(
      std::span(reinterpret_cast<uint32_t*>(memory.choices),
                static_cast<size_t>(work.group.num_queries) * 2));
  conclude_queries(stream, work);
}

void run_group(Stream stream, const HeadWork& work) {
  launch(prepare_queries,
         {.kernel = "prepare_queries", .block = whole_warps(work.group.num_queries)}, stream, work);
  if (work.held_columns() > 0) {
    work.in.dtype == DType::kBF16 ? vocabulary_panels_bf16(stream, work)
                                  : vocabulary_panels_f32(stream, work);
  }
  if (work.in.ranks != nullptr) return run_sharded_group(stream, work);
  merge(stream, work, Merge::kAll);
  draw_truncated(stream, work);
  finish_queries(stream, work);
}

}  // namespace

void lm_head(Stream stream, const LmHeadInputs& in) {
  const HeadMemory memory = head_memory(in.workspace, in.part, in.max_rows);
  for (const HeadGroup& group : in.groups) {
    run_group(stream, {.in = in, .memory = memory, .group = group});
  }
  advance_slots(stream, in);
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
