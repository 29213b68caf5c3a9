#include "rollout/metrics/metric_table.h"

#include <cstdint>
#include <limits>
#include <utility>

#include <prometheus/text_serializer.h>

namespace rollpack::rollout {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

constexpr MetricType kGauge = MetricType::Gauge;
constexpr MetricType kCounter = MetricType::Counter;

struct Row {
  MetricType type;
  const char* name;
  const char* number;  // its name in Snapshot::values
  const char* help;
  const char* label = nullptr;
  const char* label_value = nullptr;
};

// Rows of one name stand together. The first block has vLLM's names.
constexpr Row kRows[] = {
    {kGauge, "num_requests_running", "num_running_seqs",
     "Samples (and sequences to score) that steps compute"},
    {kGauge, "num_requests_waiting", "num_waiting",
     "Samples accepted and not started, and those that were preempted"},
    {kGauge, "kv_cache_usage_perc", "kv_cache_usage",
     "Share of KV pages in use, from 0 to 1; pages that only cache count as free"},
    {kGauge, "avg_prompt_throughput_toks_per_s", "prompt_tokens_per_s",
     "Prompt tokens of samples that began, a second, over the last 5 s"},
    {kGauge, "avg_generation_throughput_toks_per_s", "generation_tokens_per_s",
     "Tokens sampled a second, over the last 5 s"},
    {kCounter, "prompt_tokens_total", "num_prompt_tokens",
     "Prompt tokens of samples that began, cached ones included"},
    {kCounter, "generation_tokens_total", "num_tokens_generated", "Tokens sampled"},
    {kCounter, "request_success_total", "num_samples_stop", "Samples by how they ended",
     "finished_reason", "stop"},
    {kCounter, "request_success_total", "num_samples_length", "", "finished_reason", "length"},
    {kCounter, "request_success_total", "num_samples_abort", "", "finished_reason", "abort"},
    {kCounter, "num_preemptions_total", "num_preemptions",
     "Samples sent back to the queue because KV pages ran out"},
    {kCounter, "prefix_cache_queries_total", "prefix_cache_queries",
     "Tokens that the prefix cache was asked for; siblings that share a prompt ask once"},
    {kCounter, "prefix_cache_hits_total", "prefix_cache_hits", "Tokens found in the prefix cache"},
    {kCounter, "spec_decode_num_drafts_total", "num_drafts", "Drafts verified"},
    {kCounter, "spec_decode_num_draft_tokens_total", "num_draft_tokens", "Tokens of drafts"},
    {kCounter, "spec_decode_num_accepted_tokens_total", "num_accepted_tokens",
     "Tokens of drafts that were accepted"},

    {kGauge, "engine_sleep_state", "is_awake",
     "1 for the state that the engines are in: awake, asleep at level 1, asleep at level 2",
     "sleep_state", "awake"},
    {kGauge, "engine_sleep_state", "is_asleep_at_1", "", "sleep_state", "weights_offloaded"},
    {kGauge, "engine_sleep_state", "is_asleep_at_2", "", "sleep_state", "discard_all"},

    // The engine.
    {kGauge, "num_requests_preempted", "num_preempted_seqs",
     "Of the waiting ones, those with tokens: preempted, or begun anew under new weights"},
    {kGauge, "num_requests_open", "num_open_samples", "Samples accepted and not finished"},
    {kCounter, "request_failed_total", "num_samples_failed", "Samples that ended in an error"},
    {kGauge, "kv_pages", "num_kv_pages", "KV pages of all ranks"},
    {kGauge, "kv_pages_used", "num_kv_pages_used", "KV pages that samples hold"},
    {kGauge, "kv_pages_cached", "num_kv_pages_cached",
     "KV pages that nobody holds and that are kept for later prompts"},
    {kCounter, "recomputed_tokens_total", "num_tokens_recomputed",
     "Tokens computed again after a preemption"},
    {kCounter, "engine_steps_total", "num_steps", "Steps of all ranks"},
    {kCounter, "engine_step_seconds_total", "steps_s", "Time in steps, all ranks"},
    {kCounter, "engine_scheduling_seconds_total", "scheduling_s",
     "Of it, planning steps and applying their results"},
    {kCounter, "engine_communication_seconds_total", "communication_s",
     "Of it, exchanges between the ranks that hold one model"},
    {kCounter, "engine_rows_total", "num_rows_computed", "Token rows computed, pads included"},
    {kCounter, "engine_pad_rows_total", "num_pad_rows", "Pad rows computed"},
    {kCounter, "engine_rows_after_stop_total", "num_rows_after_stop",
     "Rows planned before the stop of their sample was known"},
    {kGauge, "peak_memory_bytes", "peak_memory_bytes", "Peak resident memory, all ranks"},
    {kGauge, "held_bytes", "held_bytes",
     "Bytes of weights, KV pages and buffers that all ranks have, in use or not"},
    {kGauge, "paused", "is_paused", "1 while generation is paused"},
    {kGauge, "weights_needed", "needs_weights",
     "1 from sleep(level=2) on until a whole weight update"},

    // Weights.
    {kGauge, "weight_version", "weight_version", "Version that tokens are drawn from"},
    {kCounter, "weight_updates_total", "num_weight_updates", "Weight updates committed"},
    {kGauge, "batch_version_lag", "batch_version_lag",
     "Versions between the oldest token of the latest batch and the weights at its delivery"},
    {kCounter, "stale_samples_total", "num_stale_samples",
     "Samples that ended as errors beyond bridge.max_version_lag"},

    // Ranks.
    {kGauge, "num_workers", "num_workers", "Ranks that take part"},
    {kCounter, "worker_deaths_total", "num_worker_deaths", "Ranks lost"},
    {kCounter, "worker_replacements_total", "num_replacements",
     "Ranks started in lost ones' place"},
    {kCounter, "retries_total", "num_groups_requeued", "Groups given to another rank after a loss"},
    {kCounter, "convicted_groups_total", "num_groups_convicted",
     "Groups that ended in an error because ranks died of them"},
    {kCounter, "late_samples_dropped_total", "num_late_samples_dropped",
     "Samples of lost attempts that came all the same"},
    {kGauge, "seconds_without_progress", "longest_silence_s",
     "Longest time that a rank with work has shown no progress"},

    // The bridge.
    {kGauge, "slots", "num_slots", "Slots for batches in shared memory"},
    {kGauge, "slots_used", "num_slots_in_use", "Slots that hold a batch"},
    {kGauge, "slot_usage_perc", "slot_usage", "Share of slots that hold a batch, from 0 to 1"},
    {kGauge, "samples_held", "num_samples_held", "Finished samples that wait for a batch"},
    {kGauge, "clients", "num_clients", "Connections"},
    {kGauge, "batch_calls_waiting", "num_waiting_calls", "Calls of next_batch that wait"},
    {kCounter, "batch_calls_expired_total", "num_expired_calls",
     "Calls of next_batch that ended without a batch"},
    {kCounter, "batches_delivered_total", "num_batches_delivered", "Batches delivered"},
    {kCounter, "batches_redelivered_total", "num_batches_redelivered",
     "Batches delivered again because their client had gone"},
    {kCounter, "samples_delivered_total", "num_samples_delivered", "Samples in batches"},
    {kCounter, "batch_tokens_total", "num_tokens_delivered", "Tokens in batches"},
    {kCounter, "batch_padding_tokens_total", "num_pads_delivered", "Pads in batches"},
    {kCounter, "batch_padding_avoided_tokens_total", "num_pads_avoided",
     "Pads that rows as long as each batch's longest would have had besides"},

    // Bridges of other nodes.
    {kGauge, "node_bridges", "num_node_bridges", "Bridges of other nodes that serve"},
    {kCounter, "node_samples_total", "num_samples_kept_on_nodes",
     "Samples for bridges of other nodes, by the way they went", "way", "kept"},
    {kCounter, "node_samples_total", "num_samples_straight_to_nodes", "", "way", "straight"},
    {kCounter, "node_samples_total", "num_samples_sent_to_nodes", "", "way", "through_rank_0"},
    {kGauge, "node_samples_waiting", "num_samples_waiting_for_nodes",
     "Samples at rank 0 that bridges of other nodes have not taken yet"},
    {kCounter, "node_samples_undeliverable_total", "num_samples_undeliverable",
     "Samples dropped because the bridge that asked for them is gone"},

    // What the trainer reports.
    {kCounter, "probs_diff_reports_total", "num_probs_diff_reports",
     "Reports of the trainer's probabilities"},
    {kGauge, "rollout_probs_diff_mean", "probs_diff_mean",
     "Mean of |p_rollout - p_trainer| over sampled tokens, as last reported"},
    {kGauge, "rollout_probs_diff_max", "probs_diff_max", "Its maximum"},
    {kGauge, "rollout_probs_diff_std", "probs_diff_std", "Its standard deviation"},
    {kGauge, "rollout_k3_kl", "probs_diff_k3_kl",
     "Estimate of KL(rollout || trainer) in nats, as last reported"},
};

ClientMetric metric(MetricType type, double value, std::vector<ClientMetric::Label> labels = {}) {
  ClientMetric result;
  result.label = std::move(labels);
  if (type == kCounter) {
    result.counter.value = value;
  } else {
    result.gauge.value = value;
  }
  return result;
}

MetricFamily family(MetricType type, const std::string& name, const char* help) {
  return {.name = "rollpack:" + name, .help = help, .type = type, .metric = {}};
}

// A counter that nobody has told of yet stands at 0; a gauge that is not known is left out.
void add_rows(const Snapshot& snapshot, std::vector<MetricFamily>& families) {
  for (const Row& row : kRows) {
    const auto found = snapshot.values.find(row.number);
    const bool is_known = found != snapshot.values.end();
    if (!is_known && row.type == kGauge) continue;
    const bool is_new = families.empty() || families.back().name.substr(9) != row.name;
    if (is_new) families.push_back(family(row.type, row.name, row.help));
    std::vector<ClientMetric::Label> labels;
    if (row.label != nullptr) labels.push_back({row.label, row.label_value});
    families.back().metric.push_back(
        metric(row.type, is_known ? found->second : 0, std::move(labels)));
  }
}

MetricFamily batch_wait(const bridge::WaitHistogram& waits) {
  MetricFamily result = family(MetricType::Histogram, "batch_wait_seconds",
                               "Time that calls of next_batch waited for the batch they got");
  ClientMetric::Histogram histogram;
  for (size_t i = 0; i < waits.counts.size(); ++i) {
    histogram.sample_count += static_cast<uint64_t>(waits.counts[i]);
    const bool is_last = i == waits.kBoundsS.size();
    histogram.bucket.push_back(
        {histogram.sample_count,
         is_last ? std::numeric_limits<double>::infinity() : waits.kBoundsS[i]});
  }
  histogram.sample_sum = waits.sum_s;
  ClientMetric of_all;
  of_all.histogram = std::move(histogram);
  result.metric.push_back(std::move(of_all));
  return result;
}

double number_of(const Dispatcher::WorkerNumbers& worker, const char* name) {
  if (worker.values == nullptr) return 0;
  const auto found = worker.values->find(name);
  return found == worker.values->end() ? 0 : found->second;
}

// Five lines a rank, some 300 bytes: with thousands of ranks a scrape is a megabyte.
void add_ranks(const Snapshot& snapshot, std::vector<MetricFamily>& families) {
  MetricFamily running =
      family(kGauge, "rank_num_requests_running", "Samples that steps of this rank compute");
  MetricFamily usage =
      family(kGauge, "rank_kv_cache_usage_perc", "Share of this rank's KV pages in use");
  MetricFamily tokens =
      family(kCounter, "rank_generation_tokens_total", "Tokens that this rank sampled");
  MetricFamily steps = family(kCounter, "rank_engine_steps_total", "Steps of this rank");
  MetricFamily silence = family(kGauge, "rank_seconds_without_progress",
                                "Time without progress while this rank has work");
  for (const Dispatcher::WorkerNumbers& worker : snapshot.workers) {
    const auto add = [&](MetricFamily& to, double value) {
      to.metric.push_back(metric(to.type, value, {{"rank", std::to_string(worker.rank)}}));
    };
    const double num_pages = number_of(worker, "num_kv_pages");
    add(running, number_of(worker, "num_running_seqs"));
    add(usage, num_pages > 0 ? number_of(worker, "num_kv_pages_used") / num_pages : 0);
    add(tokens, number_of(worker, "num_tokens_generated"));
    add(steps, number_of(worker, "num_steps"));
    add(silence, worker.silence_s);
  }
  for (MetricFamily* of_ranks : {&running, &usage, &tokens, &steps, &silence}) {
    families.push_back(std::move(*of_ranks));
  }
}

}  // namespace

std::vector<MetricFamily> metric_families(const Snapshot& snapshot, const Health& health,
                                          const JobLabels& labels) {
  std::vector<MetricFamily> families;
  add_rows(snapshot, families);
  families.push_back(batch_wait(snapshot.batch_waits));
  add_ranks(snapshot, families);
  families.push_back(family(kGauge, "healthy", "1 where /health answers 200"));
  families.back().metric.push_back(metric(kGauge, health.is_well ? 1 : 0));
  families.push_back(family(kGauge, "info", "1; what runs, in its labels"));
  families.back().metric.push_back(metric(
      kGauge, 1,
      {{"model_name", labels.model_name}, {"dtype", labels.dtype}, {"batching", labels.batching}}));
  return families;
}

std::string metrics_text(const std::vector<MetricFamily>& families) {
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace rollpack::rollout
