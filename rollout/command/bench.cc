#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "kernels/machine_limits.h"
#include "kernels/philox.h"
#include "rollout/command/command.h"
#include "rollout/command/end_signal.h"
#include "rollout/jsonl/readers.h"
#include "trainer_bridge/contract/sample_sink.h"

namespace rollpack::rollout {
namespace {

using Clock = std::chrono::steady_clock;

class SampleCounter : public bridge::SampleSink {
 public:
  explicit SampleCounter(EndSignal& end) : end_(end) {}
  void commit(bridge::Sample) override { count(std::nullopt); }
  void fail(bridge::FailedSample sample) override { count(std::move(sample.error)); }
  int64_t num_done() const {
    const std::lock_guard lock(mutex_);
    return num_done_;
  }
  bridge::Outcome error() const {
    const std::lock_guard lock(mutex_);
    return error_;
  }

 private:
  void count(bridge::Outcome error) {
    {
      const std::lock_guard lock(mutex_);
      ++num_done_;
      if (error && !error_) error_ = std::move(error);
    }
    end_.notify();
  }

  EndSignal& end_;
  mutable std::mutex mutex_;
  int64_t num_done_ = 0;
  bridge::Outcome error_;
};

// Random ids where the workload gives a length only: token i of prompt p is drawn by (p, i).
std::vector<int32_t> prompt_tokens(const WorkloadGroup& group, uint32_t index, int64_t V) {
  if (!group.input_ids.empty()) return group.input_ids;
  std::vector<int32_t> ids(group.prompt_tokens);
  for (size_t i = 0; i < ids.size(); ++i) {
    const uint32_t word = kernels::philox4x32({static_cast<uint32_t>(i), index, 0, 0}, {0, 0})[0];
    ids[i] = static_cast<int32_t>(uint64_t{word} * static_cast<uint64_t>(V) >> 32);
  }
  return ids;
}

std::vector<GroupRequest> make_groups(const std::vector<WorkloadGroup>& workload, const Job& job) {
  const ModelConfig& model = job.replica().model();
  std::vector<GroupRequest> groups;
  for (size_t i = 0; i < workload.size(); ++i) {
    GroupRequest group;
    group.key.prompt_id = workload[i].prompt_id;
    group.key.group_size = static_cast<int32_t>(workload[i].response_tokens.size());
    group.prompt_ids = std::make_shared<const std::vector<int32_t>>(
        prompt_tokens(workload[i], static_cast<uint32_t>(i), model.vocab_size));
    group.sampling = resolve_sampling(job.config().rollout, {.ignore_eos = true},
                                      model.eos_token_ids, model.vocab_size, "workload");
    group.response_lengths = workload[i].response_tokens;
    groups.push_back(std::move(group));
  }
  return groups;
}

// Multiply-adds x 2 that the workload needs at least: a prompt once a group, each response token
// but the last through the layers, each sampled token through the head, each visible (token, key)
// pair.
double workload_flops(const std::vector<WorkloadGroup>& workload, const ModelConfig& model) {
  const auto D = static_cast<double>(model.hidden_size), K = static_cast<double>(model.head_dim);
  const auto H = static_cast<double>(model.num_attention_heads);
  const auto G = static_cast<double>(model.num_key_value_heads);
  const auto L = static_cast<double>(model.num_hidden_layers);
  const double layer =
      (2 * H + 2 * G) * K * D + 3 * D * static_cast<double>(model.intermediate_size);
  double tokens = 0, sampled = 0, pairs = 0;
  for (const WorkloadGroup& group : workload) {
    const double P = group.prompt_tokens;
    tokens += P;
    pairs += P * (P + 1) / 2;
    for (const double R : group.response_tokens) {
      if (R < 1) continue;
      tokens += R - 1;
      sampled += R;
      pairs += (R - 1) * P + (R - 1) * R / 2;
    }
  }
  return 2 * L * layer * tokens + 2 * D * static_cast<double>(model.vocab_size) * sampled +
         4 * L * H * K * pairs;
}

std::map<std::string, double> settled_stats(Dispatcher& dispatcher, double num_generated) {
  // Workers report when they fall idle: their last numbers are a message behind the last sample.
  const auto deadline = Clock::now() + std::chrono::seconds(5);
  for (;;) {
    const auto stats = dispatcher.stats();
    std::map<std::string, double> values(stats.begin(), stats.end());
    if (values["num_tokens_generated"] >= num_generated || Clock::now() > deadline) return values;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

}  // namespace

int bench(Job& job, const CommandLine& line) {
  const std::vector<WorkloadGroup> workload = read_workload(line.input);
  const ModelConfig& model = job.replica().model();
  const DType dtype = job.config().model.dtype == "float32" ? DType::kF32 : DType::kBF16;
  double num_prompt_tokens = 0, num_response_tokens = 0;
  int64_t num_samples = 0;
  for (const WorkloadGroup& group : workload) {
    num_prompt_tokens += group.prompt_tokens;
    num_samples += static_cast<int64_t>(group.response_tokens.size());
    for (const int32_t length : group.response_tokens) num_response_tokens += length;
  }
  EndSignal end;
  SampleCounter counter(end);
  Dispatcher& dispatcher = job.dispatcher();
  dispatcher.set_sink(counter);
  dispatcher.set_on_end([&end] { end.raise(1); });
  job.start();
  std::vector<double> passes_s;
  for (int pass = 0; pass < line.repeat; ++pass) {
    const int64_t target = counter.num_done() + num_samples;
    const auto start = Clock::now();
    dispatcher.submit_groups(make_groups(workload, job));
    const bool ended = end.wait([&] { return counter.num_done() >= target || counter.error(); });
    passes_s.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    const bridge::Outcome broken = ended ? dispatcher.health() : counter.error();
    if (broken) throw Error(*broken);
    if (ended) {
      job.stop(/*hand_back=*/false);
      return end.status();
    }
  }
  const auto stats = settled_stats(dispatcher, num_response_tokens * line.repeat);
  job.stop(/*hand_back=*/false);
  const kernels::MachineLimits limits =
      kernels::measure_machine_limits(dtype, job.num_threads() * job.num_ranks());
  const double wall_s = *std::ranges::min_element(passes_s);
  const nlohmann::ordered_json report = {
      {"wall_s", wall_s},
      {"passes_s", passes_s},
      {"prompt_tokens", num_prompt_tokens},
      {"response_tokens", num_response_tokens},
      {"response_tokens_per_s", num_response_tokens / wall_s},
      {"tokens_computed", stats.at("num_rows_computed") / line.repeat},
      {"peak_memory_bytes", stats.at("peak_memory_bytes")},
      {"peak_flops", limits.peak_flops},
      {"read_bandwidth_bytes_per_s", limits.read_bandwidth_bytes_per_s},
      {"roofline_share", workload_flops(workload, model) / limits.peak_flops / wall_s},
      {"backend", job.replica().backend_description()},
      {"num_ranks", job.num_ranks()},
      {"num_threads", job.num_threads()}};
  fmt::print("{}\n", report.dump());
  return 0;
}

}  // namespace rollpack::rollout
