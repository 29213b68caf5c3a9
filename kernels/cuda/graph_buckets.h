// Which steps are graphs: how many rows they have, and what their graphs may cost. Pure functions.
//
// A graph is of steps that only decode, padded to its number of rows, its bucket. The buckets are
// 1, 2, 4 and 8 rows, then every 8 up to 64, every 16 up to 256 and every 32 up to 512, and the
// largest number of rows there is: 23 of them for 256 rows, 31 for 512. These steps divide the
// tiles of the products of bf16 (8 rows of the step up to 8, 32 up to 32, else 64), so that
// skipped rows never cost a tile more; what they cost in kernels of single rows is a block that
// returns.
// Source: the buckets of vLLM, without those that save nothing here.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/step_plan.h"

namespace rollpack::kernels::cuda {

// Steps of more rows compute longer than their kernels take to launch.
inline constexpr int32_t kMaxGraphRows = 512;

// Row counts with a graph, ascending, for steps of at most `max_rows`; none for 0.
std::vector<int32_t> graph_buckets(int32_t max_rows);
// The same for a backend: none where options.enforce_eager.
std::vector<int32_t> graph_buckets(const BackendOptions& options);
// The smallest bucket of at least `rows`; 0: there is none.
int32_t bucket_for(std::span<const int32_t> buckets, int32_t rows);

// Whether a step may be a graph: every sequence has one row, which is no pad, and the step draws
// once from every row and scores none. (So it has no drafts.) It may fill slots and copy pages.
bool is_pure_decoding(const StepPlan& plan);

// Kernels that a layer launches: two norms, rotation, attention and four products.
inline constexpr int64_t kLayerLaunches = 8;
// All kernels behind begin_step of a step of `rows` rows that only decodes.
int64_t step_launches(const ModelShape& shape, int64_t rows);

// Bytes that the graphs of a backend may take: those of each bucket, once for every step that may
// be under way. What a kernel of a graph takes is not documented: 4 KiB are the most that its
// arguments may be, and 64 KiB are for what a graph has once. Graphs that would take more are not
// kept (decode_graphs.h).
int64_t graph_bytes(const ModelShape& shape, const BackendOptions& options);

}  // namespace rollpack::kernels::cuda
