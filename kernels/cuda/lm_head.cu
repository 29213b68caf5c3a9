// The head, one group of rows after the other: what is asked of them, statistics of all panels as
// logits are computed, rows from panels, draws, results. Then slots go on.
#include "kernels/cuda/lm_head.h"

#include <algorithm>

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
  const bool is_cut = !is_greedy && ((slot.top_k > 0 && slot.top_k < work.V()) ||
                                     slot.top_p < 1.0f || slot.min_p > 0.0f);
  return {.row = head.sample_head_row[result] - work.group.first_row,
          .result = result,
          .slot = index,
          .token = 0,
          .position = position,
          .distribution = 0,
          .scale = is_greedy ? 1.0f : 1.0f / slot.temperature,
          .is_greedy = is_greedy ? 1 : 0,
          .is_cut = is_cut ? 1 : 0,
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
  query.distribution = query.scale == 1.0f ? query.row : work.max_rows + owner;
}

// A block a distribution: panels to blocks of the vocabulary, a thread a block, then blocks to the
// row, all in order and in f64.
__global__ void __launch_bounds__(kMaxMergeThreads) merge_panels(HeadWork work) {
  const HeadMemory& memory = work.memory;
  const auto index = static_cast<int32_t>(blockIdx.x);
  const bool is_row = index < work.group.num_rows;
  const int32_t q = index - work.group.num_rows;
  if (is_row && memory.queries[memory.row_begin[index]].is_skipped != 0) return;
  if (!is_row && memory.queries[q].distribution != work.max_rows + q) return;
  const int64_t distribution = is_row ? index : work.max_rows + q;
  const auto thread = static_cast<int64_t>(threadIdx.x);
  const int64_t num_blocks = memory.num_blocks;
  const PanelStats* const panels = memory.panels + distribution * memory.num_panels;
  float* const block_max = memory.block_max + distribution * num_blocks;
  double* const masses = memory.block_masses + distribution * num_blocks;
  auto* const weighted = reinterpret_cast<double*>(dynamic_shared());  // [num_blocks]
  auto* const finite = reinterpret_cast<int32_t*>(weighted + num_blocks);
  for (int64_t block = thread; block < num_blocks; block += blockDim.x) {
    const int64_t begin = block * kBlockPanels, left = memory.num_panels - begin;
    const int64_t end = begin + (left < kBlockPanels ? left : kBlockPanels);
    float max = -infinity_f32();
    int32_t is_block_finite = 1;
    for (int64_t p = begin; p < end; ++p) {
      max = fmaxf(max, panels[p].max);
      is_block_finite &= panels[p].is_finite;
    }
    double sum = 0, block_weighted = 0;
    for (int64_t p = begin; p < end; ++p) {
      const float shift = panels[p].max - max;
      const double factor = exp_f32(shift);
      sum += static_cast<double>(panels[p].sum) * factor;
      block_weighted += (static_cast<double>(panels[p].weighted) +
                         static_cast<double>(shift) * static_cast<double>(panels[p].sum)) *
                        factor;
    }
    block_max[block] = max;
    masses[block] = sum;
    weighted[block] = block_weighted;
    finite[block] = is_block_finite;
  }
  __syncthreads();
  float max = -infinity_f32();
  int32_t is_row_finite = 1;
  for (int64_t block = 0; block < num_blocks; ++block) {
    max = fmaxf(max, block_max[block]);
    is_row_finite &= finite[block];
  }
  for (int64_t block = thread; block < num_blocks; block += blockDim.x) {
    const float shift = block_max[block] - max;
    const double factor = exp_f32(shift), sum = masses[block];
    weighted[block] = (weighted[block] + static_cast<double>(shift) * sum) * factor;
    masses[block] = sum * factor;
  }
  __syncthreads();
  if (thread != 0) return;
  double total = 0, total_weighted = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    total += masses[block];
    total_weighted += weighted[block];
  }
  memory.row_stats[distribution] = {total, log_f64(total), total_weighted, max, is_row_finite};
}

void run_group(Stream stream, const HeadWork& work) {
  launch(prepare_queries,
         {.kernel = "prepare_queries", .block = whole_warps(work.group.num_queries)}, stream, work);
  work.in.dtype == DType::kBF16 ? vocabulary_panels_bf16(stream, work)
                                : vocabulary_panels_f32(stream, work);
  launch(merge_panels,
         {.kernel = "merge_panels",
          .grid = {.x = static_cast<uint32_t>(work.group.num_rows + work.group.num_queries)},
          .block = std::min(whole_warps(work.memory.num_blocks), kMaxMergeThreads),
          .shared_bytes = work.memory.num_blocks * 12},
         stream, work);
  draw_truncated(stream, work);
  finish_queries(stream, work);
}

}  // namespace

void lm_head(Stream stream, const LmHeadInputs& in) {
  const HeadMemory memory = head_memory(in.workspace, in.weight.N, in.max_rows);
  for (const HeadGroup& group : in.groups) {
    run_group(stream, {.in = in, .memory = memory, .group = group, .max_rows = in.max_rows});
  }
  advance_slots(stream, in);
}

}  // namespace rollpack::kernels::cuda::inline ROLLPACK_SIMT
