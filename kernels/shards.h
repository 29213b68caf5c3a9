// How a replica's ranks share out a model: which heads, columns and vocabulary blocks each of them
// holds. Only outputs are cut, never what a sum runs over, so the number of ranks changes no bit.
// Pure functions, for host and device alike.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace rollpack::kernels {

// One rank of a replica.
struct ReplicaRank {
  int32_t rank = 0;
  int32_t size = 1;
};

// Rows [begin, end) of a part that a rank holds; {0, part_rows} on a single rank. May be empty.
struct ShardRange {
  int64_t begin = 0, end = 0;

  constexpr int64_t size() const { return end - begin; }
  bool operator==(const ShardRange&) const = default;
};

inline constexpr int64_t kShardColumns = 64;       // a panel of a packed weight
inline constexpr int64_t kShardVocabulary = 1024;  // a block of the head's statistics

// Part `index` of `count` things cut into num_parts that differ by one at most, larger ones first.
constexpr ShardRange part_of(int64_t count, int64_t index, int64_t num_parts) {
  const int64_t each = count / num_parts, larger = count % num_parts;
  const int64_t begin = index * each + std::min(index, larger);
  return {begin, begin + each + (index < larger ? 1 : 0)};
}

// The same of columns that are not cut within a unit.
constexpr ShardRange part_in_units(int64_t columns, int64_t unit, ReplicaRank at) {
  const ShardRange units = part_of((columns + unit - 1) / unit, at.rank, at.size);
  return {std::min(units.begin * unit, columns), std::min(units.end * unit, columns)};
}

// Output columns of a matrix: whole panels, or single columns where there are fewer panels than
// ranks.
constexpr ShardRange column_shard(int64_t columns, ReplicaRank at) {
  return part_in_units(columns, columns >= kShardColumns * at.size ? kShardColumns : 1, at);
}

// Rows of the vocabulary: whole blocks, so a rank has none where there are more ranks than blocks.
constexpr ShardRange vocabulary_shard(int64_t V, ReplicaRank at) {
  return part_in_units(V, kShardVocabulary, at);
}

// Query heads of a rank, and the KV heads that these use.
struct HeadShard {
  ShardRange query, kv;
};

// Whole groups of H / G query heads and their KV head while there are as many groups as ranks;
// otherwise each group's heads are shared out among some ranks, all of which hold its KV head. So
// every KV head of a rank serves equally many of its query heads. Needs at.size <= H.
constexpr HeadShard head_shard(int64_t H, int64_t G, ReplicaRank at) {
  const int64_t group = H / G;
  if (at.size <= G) {
    const ShardRange kv = part_of(G, at.rank, at.size);
    return {{kv.begin * group, kv.end * group}, kv};
  }
  int64_t g = 0;
  while (part_of(at.size, g, G).end <= at.rank) ++g;
  const ShardRange ranks = part_of(at.size, g, G);
  const ShardRange heads = part_of(group, at.rank - ranks.begin, ranks.size());
  return {{g * group + heads.begin, g * group + heads.end}, {g, g + 1}};
}

// Where each rank's part begins, and where the last one ends: [size + 1], times `width`.
template <class ShardOf>
std::vector<int64_t> shard_starts(int32_t size, int64_t width, const ShardOf& shard_of) {
  std::vector<int64_t> starts = {0};
  for (int32_t rank = 0; rank < size; ++rank) {
    starts.push_back(shard_of(ReplicaRank{rank, size}).end * width);
  }
  return starts;
}

}  // namespace rollpack::kernels
