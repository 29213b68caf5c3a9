#include "tests/bench/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>

namespace rollpack::bench {
namespace {

using Run = benchmark::BenchmarkReporter::Run;

// Counters that the table reads; the others are its own notes.
constexpr const char* kFlops = "_flops";
constexpr const char* kBytes = "_bytes";
constexpr const char* kPeak = "_peak";
constexpr const char* kThreads = "_threads";
constexpr std::string_view kRival = "rival ";

bool smoke = false;

double counter(const Run& run, const std::string& name) {
  const auto found = run.counters.find(name);
  return found == run.counters.end() ? 0 : found->second.value;
}

double seconds_of(const Run& run) {
  return run.real_accumulated_time / static_cast<double>(std::max<int64_t>(1, run.iterations));
}

double median(const std::vector<Run>& runs, const std::function<double(const Run&)>& value) {
  std::vector<double> values;
  for (const Run& run : runs) values.push_back(value(run));
  std::ranges::sort(values);
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

std::string time_text(double seconds) {
  if (seconds < 1e-3) return fmt::format("{:.1f} us", seconds * 1e6);
  return fmt::format("{:.2f} ms", seconds * 1e3);
}

// "  x 1.02 onednn  ..." and the notes.
std::string further_columns(const std::vector<Run>& runs) {
  std::string text;
  for (const auto& [name, unused] : runs.front().counters) {
    if (name.starts_with(kRival)) {
      const double ratio = median(
          runs, [&name = name](const Run& run) { return counter(run, name) / seconds_of(run); });
      text += fmt::format("  {:.2f} x {}", ratio, name.substr(kRival.size()));
    } else if (!name.starts_with('_')) {
      const double value =
          median(runs, [&name = name](const Run& run) { return counter(run, name); });
      text += fmt::format("  {} {:.3g}", name, value);
    }
  }
  return text;
}

void print_line(const std::vector<Run>& runs) {
  const Run& first = runs.front();
  const double seconds = median(runs, seconds_of);
  const double flops = counter(first, kFlops), bytes = counter(first, kBytes);
  const auto num_threads = static_cast<int>(counter(first, kThreads));
  const auto peak = static_cast<Limit>(counter(first, kPeak));
  const double at_peak = flops > 0 ? flops / limit_of(peak, num_threads) : 0;
  const double at_bandwidth = bytes > 0 ? bytes / limit_of(Limit::kReadBandwidth, num_threads) : 0;
  const Limit binding = at_peak >= at_bandwidth ? peak : Limit::kReadBandwidth;
  const std::string share =
      is_smoke()
          ? ""
          : fmt::format("{:>5.1f} % of {:<9}", 100 * std::max(at_peak, at_bandwidth) / seconds,
                        limit_name(binding));
  const std::string& args = first.run_name.args;
  fmt::print("{:<56} {:>10} {:>8} {:>7}  {}{}\n",
             first.run_name.function_name + (args.empty() ? "" : "/" + args), time_text(seconds),
             flops > 0 ? fmt::format("{:.1f}", flops / seconds * 1e-9) : "-",
             bytes > 0 ? fmt::format("{:.1f}", bytes / seconds * 1e-9) : "-", share,
             further_columns(runs));
}

}  // namespace

bool is_smoke() {
  return smoke;
}
void set_smoke(bool value) {
  smoke = value;
}

void set_work(benchmark::State& state, const Work& work) {
  state.counters[kFlops] = work.flops;
  state.counters[kBytes] = work.bytes;
  state.counters[kPeak] = static_cast<double>(work.peak);
  state.counters[kThreads] = work.num_threads;
  // Asked for here so that they are measured before the first benchmark that needs them.
  if (work.flops > 0) limit_of(work.peak, work.num_threads);
  if (work.bytes > 0) limit_of(Limit::kReadBandwidth, work.num_threads);
}

void set_rival(benchmark::State& state, const std::string& name, double seconds) {
  state.counters[std::string(kRival) + name] = seconds;
}

void set_note(benchmark::State& state, const std::string& name, double value) {
  state.counters[name] = value;
}

void TableReporter::ReportRuns(const std::vector<Run>& runs) {
  std::vector<Run> repetitions;
  for (const Run& run : runs) {
    if (run.error_occurred) {
      fmt::print(stderr, "{}: {}\n", run.benchmark_name(), run.error_message);
      has_errors_ = true;
    } else if (run.run_type == Run::RT_Iteration) {
      repetitions.push_back(run);
    }
  }
  if (!repetitions.empty()) runs_.push_back(std::move(repetitions));
}

void TableReporter::print() const {
  fmt::print("{:<56} {:>10} {:>8} {:>7}  {}\n", "benchmark", "median", "GFLOP/s", "GB/s",
             "share of the limit that binds");
  for (const std::vector<Run>& runs : runs_) print_line(runs);
}

}  // namespace rollpack::bench
