#include "kernels/cuda/graph_buckets.h"

#include <algorithm>

#include "kernels/cuda/lm_head.h"
#include "kernels/cuda/step_memory.h"

namespace rollpack::kernels::cuda {
namespace {

constexpr int64_t kLaunchBytes = int64_t{4} << 10;
constexpr int64_t kGraphBytes = int64_t{64} << 10;

int32_t next_bucket(int32_t rows) {
  if (rows < 8) return 2 * rows;
  if (rows < 64) return rows + 8;
  return rows < 256 ? rows + 16 : rows + 32;
}

}  // namespace

std::vector<int32_t> graph_buckets(int32_t max_rows) {
  const int32_t last = std::min(max_rows, kMaxGraphRows);
  std::vector<int32_t> buckets;
  for (int32_t rows = 1; rows < last; rows = next_bucket(rows)) buckets.push_back(rows);
  if (last > 0) buckets.push_back(last);
  return buckets;
}

std::vector<int32_t> graph_buckets(const BackendOptions& options) {
  if (options.enforce_eager) return {};
  return graph_buckets(std::min(options.max_num_seqs, options.max_num_batched_tokens));
}

int32_t bucket_for(std::span<const int32_t> buckets, int32_t rows) {
  const auto at = std::ranges::lower_bound(buckets, rows);
  return rows > 0 && at != buckets.end() ? *at : 0;
}

bool is_pure_decoding(const StepPlan& plan) {
  const size_t num_rows = plan.input_ids.size();
  if (num_rows == 0 || plan.positions.size() != num_rows || plan.sequences.size() != num_rows ||
      plan.samples.size() != num_rows || !plan.scores.empty()) {
    return false;
  }
  for (const StepSequence& sequence : plan.sequences) {
    if (sequence.num_rows != 1) return false;
  }
  std::vector<bool> is_drawn(num_rows, false);
  for (const SampleRow& sample : plan.samples) {
    const auto row = static_cast<size_t>(sample.row);
    if (row >= num_rows || plan.positions[row] == kPadPosition || is_drawn[row]) return false;
    is_drawn[row] = true;
  }
  return true;
}

int64_t step_launches(const ModelShape& shape, int64_t rows) {
  // Embedding, gathering, the last norm, acceptance; five kernels for a group of head rows.
  const int64_t groups = (rows + kGroupRows - 1) / kGroupRows;
  return shape.L * kLayerLaunches + 4 + 5 * groups;
}

int64_t graph_bytes(const ModelShape& shape, const BackendOptions& options) {
  int64_t bytes = 0;
  for (const int32_t rows : graph_buckets(options)) {
    bytes += kMaxStepsUnderWay * (kGraphBytes + step_launches(shape, rows) * kLaunchBytes);
  }
  return bytes;
}

}  // namespace rollpack::kernels::cuda
