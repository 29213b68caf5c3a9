// What a benchmark says of its work, and the table that sets it beside the limits of the machine.
#pragma once

#include <benchmark/benchmark.h>

#include <string>
#include <vector>

#include "tests/bench/limits.h"

namespace rollpack::bench {

// Whether this run only checks that every benchmark works: small sizes, one iteration, no limits.
bool is_smoke();
void set_smoke(bool value);

// Of one iteration.
struct Work {
  double flops = 0;  // 2 a multiply-add; 0: only bytes are counted
  double bytes = 0;  // distinct bytes read; 0: only FLOPs are counted
  Limit peak = Limit::kBF16Peak;
  int num_threads = 1;
};
// The share of a line is max(flops / peak, bytes / bandwidth) / time: of whichever limit binds.
void set_work(benchmark::State& state, const Work& work);

// Seconds that another implementation took for the same work, iteration by iteration in turn with
// ours; the table says how many times ours is faster.
void set_rival(benchmark::State& state, const std::string& name, double seconds);

// A further column "name: value", such as a share of the step.
void set_note(benchmark::State& state, const std::string& name, double value);

// Keeps the runs; prints the table when the limits are final. Times are medians of repetitions.
class TableReporter : public benchmark::BenchmarkReporter {
 public:
  bool ReportContext(const Context&) override { return true; }
  void ReportRuns(const std::vector<Run>& runs) override;
  void clear() { runs_.clear(); }
  void print() const;
  bool has_errors() const { return has_errors_; }

 private:
  std::vector<std::vector<Run>> runs_;  // [benchmarks][repetitions]
  bool has_errors_ = false;
};

}  // namespace rollpack::bench
