#include "kernels/reference/token_sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/philox.h"

namespace rollpack::kernels::reference {
namespace {

constexpr int64_t kBlockColumns = 1024;
constexpr int64_t kPanelColumns = 64;
constexpr double kCut = -std::numeric_limits<double>::infinity();

double max_of(const std::vector<double>& x) {
  return *std::max_element(x.begin(), x.end());
}

// x[i] - log(sum exp(x)), arranged so that the result is never above 0.
double log_softmax(const std::vector<double>& x, double x_i) {
  const double max = max_of(x);
  double sum = 0;
  for (const double v : x) sum += std::exp(v - max);
  return (x_i - max) - std::log(sum);
}

double log_sum_exp(const std::vector<double>& x) {
  return -log_softmax(x, 0.0);
}

double entropy_of(const std::vector<double>& x) {
  const double max = max_of(x);
  double sum = 0, weighted = 0;
  for (const double v : x) {
    const double e = std::exp(v - max);
    sum += e;
    weighted += (v - max) * e;
  }
  return std::log(sum) - weighted / sum;
}

// Which cell of [begin, end), cut every `columns`, holds the point `target` of the running mass;
// target is left relative to that cell. Where rounding leaves none: the last cell with any mass.
int64_t cell_at(const std::vector<double>& x, int64_t begin, int64_t end, int64_t columns,
                double max, double& target) {
  double before = 0, before_last = 0;
  int64_t last = begin;
  for (int64_t cell = begin; cell < end; cell += columns) {
    double mass = 0;
    for (int64_t i = cell; i < std::min(cell + columns, end); ++i) mass += std::exp(x[i] - max);
    if (mass > 0) {
      last = cell;
      before_last = before;
    }
    if (before + mass > target) break;
    before += mass;
  }
  target -= before_last;
  return last;
}

int32_t draw(const std::vector<double>& x, double u) {
  const auto V = static_cast<int64_t>(x.size());
  const double max = max_of(x);
  double total = 0;
  for (const double v : x) total += std::exp(v - max);
  double target = u * total;
  const int64_t block = cell_at(x, 0, V, kBlockColumns, max, target);
  const int64_t block_end = std::min(block + kBlockColumns, V);
  const int64_t panel = cell_at(x, block, block_end, kPanelColumns, max, target);
  const int64_t panel_end = std::min(panel + kPanelColumns, block_end);
  return static_cast<int32_t>(cell_at(x, panel, panel_end, 1, max, target));
}

}  // namespace

TokenSampler::TokenSampler(int64_t V)
    : logits_(static_cast<size_t>(V)),
      scaled_(static_cast<size_t>(V)),
      support_(static_cast<size_t>(V)) {
  order_.reserve(static_cast<size_t>(V));
}

bool TokenSampler::scale(float temperature) {
  // As f32: a number that f32 backends cannot hold is no logit here either.
  const auto is_held = [](double x) { return std::isfinite(static_cast<float>(x)); };
  const double inverse = temperature == 0.0f ? 1.0 : static_cast<double>(1.0f / temperature);
  for (size_t v = 0; v < logits_.size(); ++v) scaled_[v] = logits_[v] * inverse;
  return std::all_of(logits_.begin(), logits_.end(), is_held) &&
         std::all_of(scaled_.begin(), scaled_.end(), is_held);
}

void TokenSampler::fill_support(const SlotInit& init, int32_t position) {
  support_ = scaled_;
  if (position < init.min_position) {
    for (const int32_t id : init.stop_token_ids) support_[static_cast<size_t>(id)] = kCut;
  }
  if (init.sampling.temperature != 0.0f) truncate(init.sampling);
}

void TokenSampler::truncate(const SamplingParams& sampling) {
  if (sampling.top_k <= 0 && sampling.top_p >= 1.0f && sampling.min_p <= 0.0f) return;
  order_.clear();
  for (size_t v = 0; v < support_.size(); ++v) {
    if (support_[v] != kCut) order_.push_back(static_cast<int32_t>(v));
  }
  const auto x = [&](int32_t id) { return support_[static_cast<size_t>(id)]; };
  std::sort(order_.begin(), order_.end(),
            [&](int32_t a, int32_t b) { return x(a) != x(b) ? x(a) > x(b) : a < b; });
  if (order_.empty()) return;
  const double max = x(order_.front());
  size_t kept = order_.size();
  if (sampling.top_k > 0) kept = std::min(kept, static_cast<size_t>(sampling.top_k));
  if (sampling.top_p < 1.0f) {
    double total = 0, running = 0;
    for (size_t i = 0; i < kept; ++i) total += std::exp(x(order_[i]) - max);
    size_t crossing = 0;  // the token whose mass reaches top_p stays in
    while (crossing < kept && running < sampling.top_p * total) {
      running += std::exp(x(order_[crossing++]) - max);
    }
    kept = crossing;
  }
  if (sampling.min_p > 0.0f) {
    while (kept > 1 && std::exp(x(order_[kept - 1]) - max) < sampling.min_p) --kept;
  }
  for (size_t i = kept; i < order_.size(); ++i) support_[static_cast<size_t>(order_[i])] = kCut;
}

void TokenSampler::fill_logprobs(HeadResult& result) const {
  const auto token = static_cast<size_t>(result.token);
  result.logprob = static_cast<float>(log_softmax(logits_, logits_[token]));
  result.scaled_logprob = static_cast<float>(log_softmax(scaled_, scaled_[token]));
}

HeadResult TokenSampler::sample(Slot& slot, bool wants_entropy) {
  HeadResult result{.slot = slot.init.slot, .position = slot.next_position};
  result.entropy = std::numeric_limits<float>::quiet_NaN();
  slot.token = 0;  // a legal id for the step that may already stand behind this one
  ++slot.next_position;
  const SlotInit& init = slot.init;
  const bool is_greedy = init.sampling.temperature == 0.0f;
  result.is_finite = scale(init.sampling.temperature);
  if (!result.is_finite) return result;
  fill_support(init, result.position);
  const auto best = std::max_element(support_.begin(), support_.end());  // the first of equals
  result.is_finite = *best != kCut;  // false: min_tokens left nothing to draw
  if (!result.is_finite) return result;
  if (is_greedy) {
    result.token = static_cast<int32_t>(best - support_.begin());
  } else {
    result.token = draw(support_, sampling_uniform(init.seed, init.prompt_hash, init.sample_index,
                                                   static_cast<uint32_t>(result.position)));
    if (std::find(support_.begin(), support_.end(), kCut) != support_.end()) {
      result.support_logmass =
          static_cast<float>(std::min(0.0, log_sum_exp(support_) - log_sum_exp(scaled_)));
    }
  }
  fill_logprobs(result);
  if (wants_entropy) result.entropy = static_cast<float>(entropy_of(scaled_));
  slot.token = result.token;
  if (std::binary_search(init.stop_token_ids.begin(), init.stop_token_ids.end(), result.token)) {
    result.finish = SlotFinish::kStop;
  } else if (slot.next_position >= init.end_position) {
    result.finish = SlotFinish::kLength;
  }
  return result;
}

HeadResult TokenSampler::score(int32_t token, int32_t position, float temperature) {
  HeadResult result{.position = position, .token = token};
  result.entropy = std::numeric_limits<float>::quiet_NaN();
  result.is_finite = scale(temperature);
  if (!result.is_finite) return result;
  fill_logprobs(result);
  result.entropy = static_cast<float>(entropy_of(scaled_));
  return result;
}

}  // namespace rollpack::kernels::reference
