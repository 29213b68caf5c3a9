// bench_kernels [--smoke] [--once] [Google Benchmark's options]: runs the benchmarks between two
// measurements of the machine's limits and prints one table. Where the two are more than 3 % apart,
// something else used the machine, and all of it is repeated, at most twice; with --once never.
#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <cstring>
#include <vector>

#include "tests/bench/benchmarks.h"
#include "tests/bench/limits.h"
#include "tests/bench/report.h"

namespace {

constexpr int kMaxAttempts = 3;
constexpr double kMaxApart = 1.03;

}  // namespace

int main(int argc, char** argv) {
  using rollpack::bench::is_smoke;
  // An iteration of a smoke run is long enough to show that the benchmark works.
  static char min_time[] = "--benchmark_min_time=0", one_repetition[] = "--benchmark_repetitions=1";
  int max_attempts = kMaxAttempts;
  std::vector<char*> arguments;
  for (int i = 0; i < argc; ++i) {
    if (std::strcmp(argv[i], "--smoke") == 0) {
      rollpack::bench::set_smoke(true);
    } else if (std::strcmp(argv[i], "--once") == 0) {
      max_attempts = 1;
    } else {
      arguments.push_back(argv[i]);
    }
  }
  if (is_smoke()) {
    arguments.push_back(min_time);
    arguments.push_back(one_repetition);
  }
  int num_arguments = static_cast<int>(arguments.size());
  benchmark::Initialize(&num_arguments, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(num_arguments, arguments.data())) return 2;

  rollpack::bench::add_gemm_benchmarks();
  rollpack::bench::add_op_benchmarks();

  rollpack::bench::TableReporter reporter;
  for (int attempt = 1;; ++attempt) {
    reporter.clear();
    if (benchmark::RunSpecifiedBenchmarks(&reporter) == 0) {
      fmt::print(stderr, "bench_kernels: no benchmark fits the filter\n");
      return 2;
    }
    const double apart = rollpack::bench::measure_limits_again();
    if (apart <= kMaxApart) break;
    fmt::print(stderr, "bench_kernels: the machine's limits were {:.0f} % apart{}\n",
               100 * (apart - 1), attempt < max_attempts ? "; once more" : "");
    if (attempt == max_attempts) break;
  }
  reporter.print();
  return reporter.has_errors() ? 1 : 0;
}
