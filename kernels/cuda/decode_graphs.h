// The graphs of steps that only decode: one for every number of rows that graph_buckets.h gives
// and every place that a step's arrays may have, since two steps may be under way and a graph holds
// the addresses of one. They are captured at once, when program and weights are there, and hold
// nothing of a step but its rows' number: lengths, pages, slots and the attention's work list are
// read on the device. A graph enqueues what the program would, so it changes no bit.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/step_memory.h"

namespace rollpack::kernels::cuda {

// All of a step that its kernels are given from the host.
struct StepAddresses {
  StepRows rows;
  HeadRows head;
  AttentionWork attention;
  const int32_t* head_queries = nullptr;

  bool operator==(const StepAddresses&) const = default;
};

class DecodeGraphs {
 public:
  // Enqueues a step of skipped rows; what it gave to its kernels.
  using Enqueue = std::function<StepAddresses(size_t place, int32_t rows)>;

  // `max_bytes` of device memory for all of them: the plan's.
  DecodeGraphs(Device& device, std::vector<int32_t> buckets, int64_t max_bytes)
      : device_(device), planned_buckets_(std::move(buckets)), max_bytes_(max_bytes) {}

  // Captures them, those of few rows first: they gain most. Ends early where the device says that
  // the graphs take more than planned; steps of more rows are enqueued kernel by kernel then.
  // Errors: those of `enqueue` and of the device; there are no graphs then.
  void capture(Stream stream, const Enqueue& enqueue);
  // No step may be under way.
  void clear();

  bool is_empty() const { return graphs_.empty(); }
  // Rows of the graph for this step, its own filled up; 0: there is none.
  int32_t rows_of(const StepPlan& plan) const;
  // Enqueues the step that was begun in `place` with the rows of a graph.
  void launch(Stream stream, size_t place, const StepAddresses& step);

  // Row counts that have graphs, ascending.
  const std::vector<int32_t>& buckets() const { return buckets_; }
  // Of device memory that they hold.
  int64_t bytes() const { return bytes_; }
  // "46 graphs of 1 to 256 rows in 5.2 MB", or why there are fewer than planned.
  std::string description() const;

 private:
  struct Captured {
    OwnGraph graph;
    StepAddresses step;
  };

  Captured capture_one(Stream stream, size_t place, int32_t rows, const Enqueue& enqueue);

  Device& device_;
  const std::vector<int32_t> planned_buckets_;
  const int64_t max_bytes_;
  std::vector<int32_t> buckets_;
  std::vector<Captured> graphs_;  // [buckets_][kMaxStepsUnderWay]
  int64_t bytes_ = 0;             // by which the device's free memory has shrunk
};

}  // namespace rollpack::kernels::cuda
