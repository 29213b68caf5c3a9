#include "rollout/metrics/top_screen.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <utility>

#include <fmt/format.h>

namespace rollpack::rollout {
namespace {

constexpr int kBarWidth = 20;

// 1234567 -> 1,234,567
std::string count(double value) {
  const std::string digits = fmt::format("{}", std::llround(value));
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && digits[i - 1] != '-' && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

std::string percent(double part, double whole) {
  return whole > 0 ? fmt::format("{:.0f}%", 100 * part / whole) : "-";
}

std::string bar(double share) {
  const int filled = static_cast<int>(std::lround(std::clamp(share, 0.0, 1.0) * kBarWidth));
  return fmt::format("[{:#<{}}{:.<{}}]", "", filled, "", kBarWidth - filled);
}

std::string title(const Scrape& now, int port) {
  const auto label = [&now](const char* name) {
    const auto found = now.info.find(name);
    return found == now.info.end() ? std::string("?") : found->second;
  };
  return fmt::format("rollpack top  127.0.0.1:{}  {}  {}  {}  {}{}{}", port, label("model_name"),
                     label("dtype"), label("batching"), now.status, now.message.empty() ? "" : ": ",
                     now.message);
}

std::string samples_line(const Scrape& now) {
  return fmt::format(
      "samples   {} running  {} waiting ({} preempted)  {} open  {} stop  {} length  {} "
      "abort  {} failed",
      count(now.get("num_requests_running")), count(now.get("num_requests_waiting")),
      count(now.get("num_requests_preempted")), count(now.get("num_requests_open")),
      count(now.get("request_success_total{finished_reason=\"stop\"}")),
      count(now.get("request_success_total{finished_reason=\"length\"}")),
      count(now.get("request_success_total{finished_reason=\"abort\"}")),
      count(now.get("request_failed_total")));
}

std::string kv_line(const Scrape& now) {
  return fmt::format(
      "KV pages  {} {:4.0f}%  {} of {}, {} cached  {} preemptions  prefix hits {}",
      bar(now.get("kv_cache_usage_perc")), 100 * now.get("kv_cache_usage_perc"),
      count(now.get("kv_pages_used")), count(now.get("kv_pages")),
      count(now.get("kv_pages_cached")), count(now.get("num_preemptions_total")),
      percent(now.get("prefix_cache_hits_total"), now.get("prefix_cache_queries_total")));
}

std::string slots_line(const Scrape& now) {
  const double num_waits = now.get("batch_wait_seconds_count");
  return fmt::format(
      "slots     {} {:4.0f}%  {} of {}  {} calls wait, {} on average  {} clients",
      bar(now.get("slot_usage_perc")), 100 * now.get("slot_usage_perc"),
      count(now.get("slots_used")), count(now.get("slots")), count(now.get("batch_calls_waiting")),
      num_waits > 0 ? fmt::format("{:.2f} s", now.get("batch_wait_seconds_sum") / num_waits) : "-",
      count(now.get("clients")));
}

std::string batches_line(const Scrape& now) {
  const double tokens = now.get("batch_tokens_total"), pads = now.get("batch_padding_tokens_total"),
               avoided = now.get("batch_padding_avoided_tokens_total");
  return fmt::format(
      "batches   {} delivered, {} again  {} tokens  {} pads, {} avoided ({} of rows)",
      count(now.get("batches_delivered_total")), count(now.get("batches_redelivered_total")),
      count(tokens), count(pads), count(avoided), percent(avoided, tokens + pads + avoided));
}

std::string weights_line(const Scrape& now) {
  std::string state = now.get("paused") > 0 ? "  paused" : "";
  if (now.get("engine_sleep_state{sleep_state=\"weights_offloaded\"}") > 0) {
    state += "  asleep at level 1";
  } else if (now.get("engine_sleep_state{sleep_state=\"discard_all\"}") > 0) {
    state += "  asleep at level 2";
  } else if (now.get("weights_needed") > 0) {
    state += "  none: a whole update is needed";
  }
  return fmt::format("weights   version {}  {} updates  batch lag {}  {} stale samples{}",
                     count(now.get("weight_version")), count(now.get("weight_updates_total")),
                     count(now.get("batch_version_lag")), count(now.get("stale_samples_total")),
                     state);
}

std::string losses_line(const Scrape& now) {
  return fmt::format("losses    {} deaths  {} replaced  {} groups tried again  {} late samples",
                     count(now.get("worker_deaths_total")),
                     count(now.get("worker_replacements_total")), count(now.get("retries_total")),
                     count(now.get("late_samples_dropped_total")));
}

std::string trainer_line(const Scrape& now) {
  const auto mean = now.find("rollout_probs_diff_mean");
  if (!mean) return "trainer   has reported no probabilities";
  return fmt::format("trainer   probs diff mean {:.2e}  max {:.2e}  k3 KL {:.2e}  {} reports",
                     *mean, now.get("rollout_probs_diff_max"), now.get("rollout_k3_kl"),
                     count(now.get("probs_diff_reports_total")));
}

double number(const std::map<std::string, double>& numbers, const char* name) {
  const auto found = numbers.find(name);
  return found == numbers.end() ? 0 : found->second;
}

std::string rank_line(const Scrape& now, const Scrape* before, int32_t rank) {
  const auto& numbers = now.ranks.at(rank);
  const double tokens = number(numbers, "generation_tokens_total");
  std::string rate = "-";
  if (before != nullptr && before->ranks.contains(rank)) {
    const std::chrono::duration<double> span = now.time - before->time;
    const double rise = tokens - number(before->ranks.at(rank), "generation_tokens_total");
    if (span.count() > 0 && rise >= 0) rate = count(rise / span.count());
  }
  return fmt::format("{:>6} {:>9} {:>5.0f}% {:>15} {:>10} {:>8.1f} s", rank,
                     count(number(numbers, "num_requests_running")),
                     100 * number(numbers, "kv_cache_usage_perc"), count(tokens), rate,
                     number(numbers, "seconds_without_progress"));
}

void add_ranks(const Scrape& now, const Scrape* before, size_t num_lines,
               std::vector<std::string>& lines) {
  if (lines.size() + 3 > num_lines) return;
  lines.push_back("");
  lines.push_back(fmt::format("{:>6} {:>9} {:>6} {:>15} {:>10} {:>10}", "rank", "running", "KV",
                              "tokens", "tokens/s", "silent"));
  std::vector<std::pair<double, int32_t>> order;  // the longest silence first, then by rank
  for (const auto& [rank, numbers] : now.ranks) {
    order.emplace_back(-number(numbers, "seconds_without_progress"), rank);
  }
  const size_t room = num_lines - lines.size();
  const size_t shown = order.size() <= room ? order.size() : room - 1;
  std::partial_sort(order.begin(), order.begin() + static_cast<ptrdiff_t>(shown), order.end());
  for (size_t i = 0; i < shown; ++i) lines.push_back(rank_line(now, before, order[i].second));
  if (shown < order.size()) lines.push_back(fmt::format("   and {} more", order.size() - shown));
}

}  // namespace

std::vector<std::string> top_screen(const Scrape& now, const Scrape* before, int port,
                                    const ScreenSize& size) {
  std::vector<std::string> lines = {
      title(now, port),
      "",
      fmt::format("tokens/s  {} sampled  {} of prompts  {} sampled in all",
                  count(now.get("avg_generation_throughput_toks_per_s")),
                  count(now.get("avg_prompt_throughput_toks_per_s")),
                  count(now.get("generation_tokens_total"))),
      samples_line(now),
      kv_line(now),
      slots_line(now),
      batches_line(now),
      weights_line(now),
      losses_line(now),
      trainer_line(now),
  };
  add_ranks(now, before, size.num_lines, lines);
  if (lines.size() > size.num_lines) lines.resize(size.num_lines);
  for (std::string& line : lines) {
    // Of a model's path or an error, which may hold anything.
    std::ranges::replace_if(
        line, [](char c) { return static_cast<unsigned char>(c) < 32; }, ' ');
    if (line.size() > size.num_columns) line.resize(size.num_columns);
  }
  return lines;
}

}  // namespace rollpack::rollout
