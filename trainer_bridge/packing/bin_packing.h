// Which samples share a row: bin packing under a hard cap, a pure function of the lengths.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace rollpack::bridge {

// Packs all items into few bins of at most `capacity`; an item is never split. Best fit decreasing:
// longest item first, each into the bin that it leaves fullest, a new bin only where none has room.
// Equal lengths are taken by lower index and equal bins by lower number, so that the result is a
// function of the arguments alone. O(n log n), whatever the capacity; at most 11/9 of the fewest
// bins possible, plus 4.
//   lengths   [n]  tokens of each item, 0 to capacity
//   capacity       tokens of a bin
// Returns item indices a bin: ascending inside a bin, bins ordered by their first item.
// Errors: invalid_argument naming the item's index, its length and the capacity.
// Source: Johnson, Demers, Ullman, Garey, Graham, Worst-case performance bounds for simple
// one-dimensional packing algorithms, SIAM J. Comput. 3 (1974).
std::vector<std::vector<int32_t>> pack_best_fit_decreasing(std::span<const int64_t> lengths,
                                                           int64_t capacity);

}  // namespace rollpack::bridge
