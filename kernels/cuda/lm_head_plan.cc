#include <algorithm>

#include "kernels/cuda/head_memory.h"
#include "kernels/cuda/lm_head.h"

namespace rollpack::kernels::cuda {

HeadPlan plan_head(std::span<const int32_t> sample_head_row,
                   std::span<const int32_t> score_head_row, int32_t num_head_rows) {
  const auto num_samples = static_cast<int32_t>(sample_head_row.size());
  const auto row_of = [&](int32_t query) {
    return query < num_samples ? sample_head_row[static_cast<size_t>(query)]
                               : score_head_row[static_cast<size_t>(query - num_samples)];
  };
  const int32_t num_queries = num_samples + static_cast<int32_t>(score_head_row.size());
  // A counting sort, stable.
  std::vector<int32_t> ends(static_cast<size_t>(num_head_rows) + 1, 0);
  for (int32_t query = 0; query < num_queries; ++query) {
    ++ends[static_cast<size_t>(row_of(query)) + 1];
  }
  for (size_t row = 1; row < ends.size(); ++row) ends[row] += ends[row - 1];
  HeadPlan plan;
  plan.queries.resize(static_cast<size_t>(num_queries));
  std::vector<int32_t> next(ends.begin(), ends.end() - 1);
  for (int32_t query = 0; query < num_queries; ++query) {
    const int32_t at = next[static_cast<size_t>(row_of(query))]++;
    plan.queries[static_cast<size_t>(at)] = query;
  }
  HeadGroup group;
  const auto flush = [&] {
    if (group.num_queries > 0) plan.groups.push_back(group);
  };
  for (int32_t row = 0; row < num_head_rows; ++row) {
    const int32_t end = ends[static_cast<size_t>(row) + 1];
    for (int32_t query = ends[static_cast<size_t>(row)]; query < end;) {
      const int32_t left = end - query;
      const bool fits = left <= kGroupQueries - group.num_queries ||
                        (group.num_queries == 0 && left > kGroupQueries);
      if (!fits || group.num_rows == kGroupRows) {
        flush();
        group = {.first_row = row, .first_query = query};
        continue;
      }
      if (group.num_queries == 0) group = {.first_row = row, .first_query = query};
      const int32_t taken = std::min(left, kGroupQueries);
      ++group.num_rows;
      group.num_queries += taken;
      query += taken;
    }
  }
  flush();
  return plan;
}

int64_t lm_head_workspace_bytes(const ModelShape& shape, const BackendOptions& options) {
  return head_memory(nullptr, vocabulary_part(shape, options.at()), lm_head_group_rows(options))
      .bytes;
}

}  // namespace rollpack::kernels::cuda
