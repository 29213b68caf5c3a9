// The workspace of the head: what its kernels hand on to each other for one group of rows. Also
// read on the host, which sizes it.
//
// A distribution is the softmax of a row at one temperature: distribution r is row r of the group
// at temperature 1, distribution num_rows + q that of query q where its temperature is another one
// and no query of the row before it has the same.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/host_device.h"
#include "kernels/cuda/lm_head.h"

namespace rollpack::kernels::cuda {

// Of a panel's columns, x = logit x scale, rounded once.
struct PanelStats {
  float max;       // m
  float sum;       // of exp(x - m)
  float weighted;  // of (x - m) exp(x - m)
  int32_t is_finite;
};

// Of a block's columns. Its sums are in f64, from those of its panels in order.
struct BlockStats {
  double sum;
  double weighted;
  float max;
  int32_t is_finite;
};

// Of a whole row.
struct RowStats {
  double total;  // sum over blocks, in order, of sum exp(m - max)
  double log_total;
  double weighted;  // sum over all x of (x - max) exp(x - max)
  float max;
  int32_t is_finite;
};

// A sample or a score of the group.
struct HeadQuery {
  int32_t row;           // of the group
  int32_t result;        // in HeadRows::results
  int32_t slot;          // -1: a score
  int32_t token;         // of a score
  int32_t position;      // of the token
  int32_t distribution;  // at its temperature
  float scale;           // 1 / temperature; 1 where that is 0
  int32_t is_greedy;
  int32_t is_cut;     // by top-k, top-p or min-p
  int32_t is_banned;  // stop tokens are out of the support
  int32_t wants_entropy;
  int32_t is_skipped;  // of a row that fills the step up to those of its graph: without a result
};

// What a query that is cut or banned drew.
struct TruncatedDraw {
  double kept;       // sum over the support of exp(x - max)
  float max;         // largest x of the support
  int32_t token;     // -1: the support is empty
  int32_t is_whole;  // nothing was cut
};

// The token of a query and its logit; all 0 on ranks that do not hold the token.
struct TokenChoice {
  int32_t token;
  float logit;
};

struct HeadMemory {
  PanelStats* panels = nullptr;     // [distributions][panels held]
  BlockStats* blocks = nullptr;     // [distributions][blocks], of all ranks once they are gathered
  double* block_masses = nullptr;   // [distributions][blocks] sum exp(m - the row's max)
  RowStats* row_stats = nullptr;    // [distributions]
  HeadQuery* queries = nullptr;     // [kGroupQueries]
  TokenChoice* choices = nullptr;   // [kGroupQueries]
  TruncatedDraw* draws = nullptr;   // [kGroupQueries]
  int32_t* row_begin = nullptr;     // [max_rows + 1] first query of a row
  int32_t* keeps_logits = nullptr;  // [max_rows]
  float* logits = nullptr;          // [max_rows][panels x 64] of rows that keep them
  int64_t num_panels = 0;           // of V
  int64_t num_blocks = 0;
  int64_t held_panels = 0;
  int64_t first_block = 0, held_blocks = 0;
  int64_t bytes = 0;  // of all

  ROLLPACK_HOST_DEVICE int64_t logits_stride() const { return num_panels * kPanelColumns; }
};

// The parts of a workspace that starts at `base`, each aligned to 256 bytes.
inline HeadMemory head_memory(void* base, const VocabularyPart& part, int32_t max_rows) {
  constexpr int64_t kBlockColumns = int64_t{kBlockPanels} * kPanelColumns;
  const auto parts_of = [](int64_t columns, int64_t width) {
    return (columns + width - 1) / width;
  };
  HeadMemory memory;
  memory.num_panels = parts_of(part.V, kPanelColumns);
  memory.num_blocks = parts_of(part.V, kBlockColumns);
  memory.held_panels = parts_of(part.held.size(), kPanelColumns);
  memory.first_block = parts_of(part.held.begin, kBlockColumns);
  memory.held_blocks = parts_of(part.held.size(), kBlockColumns);
  const int64_t distributions = max_rows + kGroupQueries;
  int64_t offset = 0;
  const auto take = [&](auto*& part, int64_t count) {
    using Part = std::remove_reference_t<decltype(part)>;
    part =
        reinterpret_cast<Part>(reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(offset));
    offset += (count * static_cast<int64_t>(sizeof(*part)) + 255) / 256 * 256;
  };
  take(memory.panels, distributions * memory.held_panels);
  take(memory.blocks, distributions * memory.num_blocks);
  take(memory.block_masses, distributions * memory.num_blocks);
  take(memory.row_stats, distributions);
  take(memory.queries, kGroupQueries);
  take(memory.choices, kGroupQueries);
  take(memory.draws, kGroupQueries);
  take(memory.row_begin, max_rows + 1);
  take(memory.keeps_logits, max_rows);
  take(memory.logits, max_rows * memory.logits_stride());
  memory.bytes = offset;
  return memory;
}

}  // namespace rollpack::kernels::cuda
