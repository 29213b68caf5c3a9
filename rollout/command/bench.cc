#include <cstdio>
#include <fstream>
#include <utility>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "rollout/bench/comparison.h"
#include "rollout/command/command.h"

namespace rollpack::rollout {
namespace {

// Forgets this process's peak of resident memory: measuring the machine took 1 GiB that the engine
// never has.
void reset_peak_memory() {
  std::ofstream file("/proc/self/clear_refs");
  file << "5" << std::flush;
  if (!file) spdlog::warn("peak_memory_bytes includes 1 GiB for measuring read bandwidth");
}

kernels::MachineLimits measure_limits(const Job& job) {
  return kernels::measure_machine_limits(job.replica().dtype(),
                                         job.num_threads() * job.num_ranks());
}

void warn_of_drift(const MachineRoof& roof) {
  if (roof.drift <= kMaxLimitsDrift) return;
  spdlog::warn(
      "the machine's limits before and after the run lie {:.1f}% apart (at most {:.0f}% is "
      "allowed): something else used it; repeat the run",
      100 * roof.drift, 100 * kMaxLimitsDrift);
}

nlohmann::ordered_json make_report(const CommandLine& line, const ModePasses& modes,
                                   const BenchSetting& setting) {
  if (line.compare.empty()) {
    return mode_report(modes.front().first, modes.front().second, setting);
  }
  nlohmann::ordered_json comparison = comparison_report(modes, setting);
  fmt::print(stderr, "{}", comparison_table(comparison));
  nlohmann::ordered_json reports = nlohmann::ordered_json::array();
  for (const auto& [name, passes] : modes) reports.push_back(mode_report(name, passes, setting));
  return {{"comparison", std::move(comparison)}, {"modes", std::move(reports)}};
}

void print_profiles(const ModePasses& modes, const BenchSetting& setting) {
  for (const auto& [name, passes] : modes) {
    fmt::print(stderr, "\n{}\n", name);
    fmt::print(stderr, "{}", profile_table(profile_report(best_of(passes), setting)));
  }
}

}  // namespace

int bench(Job& job, const CommandLine& line) {
  const Workload workload = load_workload(line.input);
  const kernels::MachineLimits before = measure_limits(job);
  reset_peak_memory();
  PassRunner runner(job);
  ModePasses modes;
  for (const std::string& name : line.compare) modes.push_back({name, {}});
  if (modes.empty()) modes.push_back({job.config().engine.batching, {}});
  for (int i = 0; i < line.repeat; ++i) {
    for (auto& [name, passes] : modes) {  // in turn: a disturbance meets all modes
      std::optional<Pass> pass = runner.run(workload, name);
      if (!pass) {
        job.stop(/*hand_back=*/false);
        return runner.status();
      }
      passes.push_back(std::move(*pass));
    }
  }
  job.stop(/*hand_back=*/false);
  const MachineRoof roof = combine(before, measure_limits(job));
  warn_of_drift(roof);
  const BenchSetting setting{.workload = workload,
                             .job = job,
                             .cost = ModelCost(job.replica().model(), job.replica().dtype()),
                             .roof = roof};
  const nlohmann::ordered_json report = make_report(line, modes, setting);
  if (line.profile) print_profiles(modes, setting);
  fmt::print("{}\n", report.dump());
  return 0;
}

}  // namespace rollpack::rollout
