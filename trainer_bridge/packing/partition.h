// Which share of the work each of several equals gets: number partitioning, purely of costs.
// costs.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace rollpack::bridge {

enum class PartSizes : uint8_t {
  kAny,    // only the sums matter
  kEqual,  // numbers of items differ by one at most
};

// Shares all items out over `num_parts` parts so that the largest sum is small: the largest
// differencing method. Partial solutions that differ most within themselves are merged first,
// largest part to smallest. Ties are broken by lower index, so that the result is a function of the
// arguments alone. O(n (log n + num_parts log num_parts)); with kAny the largest sum is at most
// 4/3 of the least possible.
//   costs  [n]  0 or more; their sum fits i64
// Returns item indices a part, ascending inside a part; parts ordered by their first item, empty
// ones last.
// Errors: invalid_argument naming num_parts below 1 or a negative cost.
// Source: Karmarkar, Karp, The differencing method of set partitioning, UCB/CSD 82/113 (1982);
// kEqual: Yakir, Math. of Operations Research 21 (1996), num_parts neighbours in order a start.
std::vector<std::vector<int32_t>> partition_balanced(std::span<const int64_t> costs,
                                                     int32_t num_parts, PartSizes sizes);

}  // namespace rollpack::bridge
