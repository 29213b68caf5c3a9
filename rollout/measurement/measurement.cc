#include "rollout/measurement/measurement.h"

#include <algorithm>
#include <chrono>

namespace rollpack::rollout {
namespace {

template <class T>
void append(std::vector<T>& target, const std::vector<T>& more) {
  target.insert(target.end(), more.begin(), more.end());
}

}  // namespace

void Measurement::add(const Measurement& other) {
  append(step_flops, other.step_flops);
  append(step_bytes, other.step_bytes);
  append(first_token_times_s, other.first_token_times_s);
  append(token_gaps_s, other.token_gaps_s);
  compute_s += other.compute_s;
  largest_step_rows += other.largest_step_rows;
  peak_pages += other.peak_pages;
  profile.add(other.profile);
  for (const auto& [name, value] : other.stats) stats[name] += value;
}

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace rollpack::rollout
