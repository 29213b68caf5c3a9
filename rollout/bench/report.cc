#include "rollout/bench/report.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include <fmt/format.h>

#include "rollout/bench/percentile.h"

namespace rollpack::rollout {
namespace {

using Json = nlohmann::ordered_json;

// null where there is nothing to speak of, such as gaps between tokens of one-token samples.
Json percentiles(const std::vector<double>& values) {
  if (values.empty()) return {{"p50", nullptr}, {"p99", nullptr}};
  return {{"p50", percentile(values, 0.5)}, {"p99", percentile(values, 0.99)}};
}

int64_t whole(double value) {
  return std::llround(value);
}

// Of the workers' numbers, those that only rise: how often something happened.
Json counters_report(const Pass& pass) {
  constexpr std::array<std::string_view, 7> kLevels = {
      "num_running_seqs",  "num_waiting_seqs",    "num_preempted_seqs", "num_kv_pages",
      "num_kv_pages_used", "num_kv_pages_cached", "peak_memory_bytes"};
  Json report = Json::object();
  for (const auto& [name, rise] : pass.counters) {
    if (std::ranges::find(kLevels, name) != kLevels.end()) continue;
    if (name.ends_with("_s")) {
      report[name] = rise;
    } else {
      report[name] = whole(rise);
    }
  }
  return report;
}

}  // namespace

const Pass& best_of(const std::vector<Pass>& passes) {
  return *std::ranges::min_element(passes, {}, &Pass::wall_s);
}

PassMemory memory_of(const Pass& pass, const BenchSetting& setting) {
  const Replica& replica = setting.job.replica();
  const kernels::BackendInfo& info = replica.backend_info();
  const double rows_share = static_cast<double>(pass.measured.largest_step_rows) /
                            replica.limits().max_num_batched_tokens;
  return {.kv_bytes = static_cast<double>(pass.measured.peak_pages * info.kv.page_bytes),
          .activation_bytes = static_cast<double>(info.memory.activation_bytes) * rows_share};
}

Json mode_report(const std::string& batching, const std::vector<Pass>& passes,
                 const BenchSetting& setting) {
  const Pass& best = best_of(passes);
  const auto& [workload, job, cost, roof] = setting;
  std::vector<double> passes_s;
  for (const Pass& pass : passes) passes_s.push_back(pass.wall_s);
  const PassMemory memory = memory_of(best, setting);
  const std::vector<double> gaps(best.measured.token_gaps_s.begin(),
                                 best.measured.token_gaps_s.end());
  Json report = {
      {"batching", batching},
      {"wall_s", best.wall_s},
      {"passes_s", passes_s},
      {"prompt_tokens", workload.num_prompt_tokens},
      {"response_tokens", workload.num_response_tokens},
      {"response_tokens_per_s", static_cast<double>(workload.num_response_tokens) / best.wall_s},
      {"tokens_computed", best.tokens_computed()},
      {"num_steps", best.counter("num_steps")},
      {"num_preemptions", best.counter("num_preemptions")},
      {"time_to_first_token_s", percentiles(best.first_token_s)},
      {"inter_token_latency_s", percentiles(gaps)},
      {"peak_memory_bytes", whole(best.peak_memory_bytes)},
      {"peak_kv_bytes", whole(memory.kv_bytes)},
      {"peak_activation_bytes", whole(memory.activation_bytes)},
      {"weight_bytes", job.replica().backend_info().memory.weight_bytes},
      {"peak_flops", roof.limits.peak_flops},
      {"read_bandwidth_bytes_per_s", roof.limits.read_bandwidth_bytes_per_s},
      {"limits_drift", roof.drift},
      {"roofline_share", workload_flops(workload, cost) / roof.limits.peak_flops / best.wall_s},
      {"step_roofline_share", roof.least_seconds(best.measured) / best.wall_s},
      {"backend", job.replica().backend_description()},
      {"num_ranks", job.num_ranks()},
      {"num_threads", job.num_threads()},
      {"counters", counters_report(best)}};
  if (best.measured.profile.num_steps > 0) report["profile"] = profile_report(best, setting);
  return report;
}

Json profile_report(const Pass& pass, const BenchSetting& setting) {
  // All times are summed over replicas, seen from one rank of each; a rank has its share of the
  // machine.
  const double num_ranks = setting.job.num_ranks();
  const double wall_s = pass.wall_s * setting.job.num_replicas();
  const kernels::StepProfile& profile = pass.measured.profile;
  double ops_s = 0;
  Json ops = Json::array();
  for (const kernels::OpProfile& op : profile.ops) {
    ops_s += op.seconds;
    const double least_s = setting.roof.least_seconds(op.flops, op.bytes) * num_ranks;
    const bool is_compute = op.flops / setting.roof.limits.peak_flops >=
                            op.bytes / setting.roof.limits.read_bandwidth_bytes_per_s;
    ops.push_back({{"op", op.name},
                   {"calls", op.num_calls},
                   {"rows", op.num_rows},
                   {"seconds", op.seconds},
                   {"share_of_time", op.seconds / wall_s},
                   {"limit", is_compute ? "peak_flops" : "read_bandwidth"},
                   {"share_of_limit", op.seconds > 0 ? least_s / op.seconds : 0}});
  }
  const double compute_s = pass.measured.compute_s;
  return {{"ops", ops},
          {"between_ops", (profile.program_s - ops_s) / wall_s},
          {"handing_steps_over", (compute_s - profile.program_s) / wall_s},
          {"outside_of_steps", (wall_s - compute_s) / wall_s}};
}

std::string profile_table(const Json& profile) {
  std::string text = fmt::format("{:<20} {:>9} {:>10} {:>9} {:>7}  {}\n", "op", "calls", "rows",
                                 "seconds", "time", "of its limit");
  const auto percent = [](double share) { return fmt::format("{:.1f}%", 100 * share); };
  for (const Json& op : profile.at("ops")) {
    text += fmt::format("{:<20} {:>9} {:>10} {:>9.3f} {:>7}  {:>6} {}\n",
                        op.at("op").get<std::string>(), op.at("calls").get<int64_t>(),
                        op.at("rows").get<int64_t>(), op.at("seconds").get<double>(),
                        percent(op.at("share_of_time")), percent(op.at("share_of_limit")),
                        op.at("limit").get<std::string>());
  }
  constexpr std::array<std::pair<const char*, const char*>, 3> kRests = {
      {{"between_ops", "between ops"},
       {"handing_steps_over", "handing steps over"},
       {"outside_of_steps", "outside of steps"}}};
  for (const auto& [key, label] : kRests) {
    text += fmt::format("{:<20} {:>9} {:>10} {:>9} {:>7}\n", label, "", "", "",
                        percent(profile.at(key)));
  }
  return text;
}

}  // namespace rollpack::rollout
