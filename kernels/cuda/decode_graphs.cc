#include "kernels/cuda/decode_graphs.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/cuda/graph_buckets.h"

namespace rollpack::kernels::cuda {

DecodeGraphs::Captured DecodeGraphs::capture_one(Stream stream, size_t place, int32_t rows,
                                                 const Enqueue& enqueue) {
  device_.begin_capture(stream);
  StepAddresses step;
  try {
    step = enqueue(place, rows);
  } catch (...) {
    device_.abandon_capture(stream);
    throw;
  }
  return {OwnGraph(device_, device_.end_capture(stream)), step};
}

void DecodeGraphs::capture(Stream stream, const Enqueue& enqueue) {
  clear();
  const int64_t free_before = device_.free_bytes();
  try {
    for (const int32_t rows : planned_buckets_) {
      for (size_t place = 0; place < kMaxStepsUnderWay; ++place) {
        graphs_.push_back(capture_one(stream, place, rows, enqueue));
      }
      const int64_t bytes = std::max<int64_t>(free_before - device_.free_bytes(), 0);
      if (bytes > max_bytes_) {
        for (int32_t i = 0; i < kMaxStepsUnderWay; ++i) graphs_.pop_back();
        return;
      }
      buckets_.push_back(rows);
      bytes_ = bytes;
    }
  } catch (...) {
    clear();
    throw;
  }
}

void DecodeGraphs::clear() {
  graphs_.clear();
  buckets_.clear();
  bytes_ = 0;
}

int32_t DecodeGraphs::rows_of(const StepPlan& plan) const {
  const auto num_rows = static_cast<int32_t>(plan.num_rows());
  const int32_t rows = bucket_for(buckets_, num_rows);
  return rows > 0 && is_pure_decoding(plan) ? rows : 0;
}

void DecodeGraphs::launch(Stream stream, size_t place, const StepAddresses& step) {
  const auto bucket = std::ranges::lower_bound(buckets_, step.rows.num_rows) - buckets_.begin();
  const Captured& captured = graphs_.at(static_cast<size_t>(bucket) * kMaxStepsUnderWay + place);
  if (captured.step != step) {
    fail_invariant(
        fmt::format("a step of {} rows is not where its graph has it", step.rows.num_rows));
  }
  device_.launch(stream, captured.graph);
}

std::string DecodeGraphs::description() const {
  if (buckets_.size() < planned_buckets_.size()) {
    return fmt::format(
        "{} graphs of decoding steps, up to {} of {} rows: more would take above the {:.1f} MB "
        "planned",
        graphs_.size(), buckets_.empty() ? 0 : buckets_.back(), planned_buckets_.back(),
        static_cast<double>(max_bytes_) * 1e-6);
  }
  return fmt::format("{} graphs of decoding steps, 1 to {} rows, in {:.1f} MB", graphs_.size(),
                     buckets_.back(), static_cast<double>(bytes_) * 1e-6);
}

}  // namespace rollpack::kernels::cuda
