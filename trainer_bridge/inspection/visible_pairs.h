// How many (query, key) pairs of a rectangle a causal sequence sees: key at or before query.
// Drawing a mask of 16,384 tokens in 24 x 24 cells needs counts, not 268 million pairs.
#pragma once

#include <algorithm>
#include <cstdint>

namespace rollpack::bridge {

// Of queries 0 .. num_queries and keys 0 .. num_keys of one sequence, in closed form.
constexpr int64_t visible_from_start(int64_t num_queries, int64_t num_keys) {
  if (num_queries <= num_keys) return num_queries * (num_queries + 1) / 2;
  return num_keys * (num_keys + 1) / 2 + (num_queries - num_keys) * num_keys;
}

// Of queries query_begin .. query_end and keys key_begin .. key_end, of a sequence that owns tokens
// `begin` .. `end`; what lies outside it sees nothing.
constexpr int64_t visible_pairs(int64_t begin, int64_t end, int64_t query_begin, int64_t query_end,
                                int64_t key_begin, int64_t key_end) {
  const auto inside = [&](int64_t token) { return std::clamp(token, begin, end) - begin; };
  const int64_t q0 = inside(query_begin), q1 = inside(query_end);
  const int64_t k0 = inside(key_begin), k1 = inside(key_end);
  return visible_from_start(q1, k1) - visible_from_start(q0, k1) - visible_from_start(q1, k0) +
         visible_from_start(q0, k0);
}

}  // namespace rollpack::bridge
