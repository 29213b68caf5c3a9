// Which samples of a step each data-parallel rank trains on, and in which micro-batches: a pure
// function of lengths, so that every rank gets its share whoever asks first.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace rollpack::bridge {

// FLOPs of a sequence in units of the attention's: tokens x (tokens + parity_tokens), where the
// linear layers of `parity_tokens` tokens cost as much as their attention.
constexpr int64_t sequence_cost(int64_t tokens, int64_t parity_tokens) {
  return tokens * (tokens + parity_tokens);
}

struct DpPlanOptions {
  int32_t dp_size = 1;
  // Strict: no row exceeds it. 0: rows are single samples, as in the padded layout.
  int64_t max_tokens_per_row = 0;
  int64_t parity_tokens = 0;
  bool keeps_groups_whole = false;
};

// Sample indices of one rank, row by row; ascending inside a row.
using RankRows = std::vector<std::vector<int32_t>>;

// Balances the cost over ranks, then over the rows (micro-batches) of each rank. With a limit, all
// ranks have the same number of rows, as few as the fullest rank needs, costliest first, so that
// ranks that wait for each other at every row wait little; where a rank has fewer samples than
// rows, its last rows are empty. Without one, numbers of samples differ by one at most (of groups,
// where they are kept whole).
//   lengths  [S]  tokens, 1 to max_tokens_per_row
//   groups   [S]  number of the sample's group, equal ones side by side
// Returns [dp_size] rows.
// Errors: invalid_argument as pack_best_fit_decreasing() and partition_balanced().
std::vector<RankRows> plan_ranks(std::span<const int64_t> lengths, std::span<const int64_t> groups,
                                 const DpPlanOptions& options);

}  // namespace rollpack::bridge
