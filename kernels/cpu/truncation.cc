#include "kernels/cpu/truncation.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "kernels/cpu/distribution.h"
#include "kernels/cpu/kernel_table.h"

namespace rollpack::kernels::cpu {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Ascending keys are descending values, ties by ascending id. Adding +0 makes -0 and +0 one value.
uint64_t order_key(float value, int32_t id) {
  const uint32_t bits = std::bit_cast<uint32_t>(value + 0.0f);
  const uint32_t ascending = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint32_t>(id);
}

int32_t id_of(uint64_t key) { return static_cast<int32_t>(key & 0xffffffffu); }

bool is_top_k_on(const SamplingParams& sampling, int64_t V) {
  return sampling.top_k > 0 && sampling.top_k < V;
}

}  // namespace

bool truncates(const SamplingParams& sampling, int64_t V) {
  return is_top_k_on(sampling, V) || sampling.top_p < 1.0f || sampling.min_p > 0.0f;
}

// Fills ordered_ with a prefix of the whole order: the first top_k tokens, or as many as reach
// target_share of mass, or all. Most of the mass lies near the largest logit, so candidates are
// gathered by distance from it, further only where that was not enough.
void TruncatedSampler::sort_candidates(float max, int64_t top_k, double target_share) {
  for (const float distance : {6.0f, 12.0f, 24.0f, std::numeric_limits<float>::infinity()}) {
    const bool is_all = distance == std::numeric_limits<float>::infinity();
    const float limit = max - distance;
    ordered_.clear();
    double mass = 0;
    for (size_t id = 0; id < scaled_.size(); ++id) {
      if (!(scaled_[id] >= limit) || scaled_[id] == kLowest) continue;
      ordered_.push_back(order_key(scaled_[id], static_cast<int32_t>(id)));
      mass += static_cast<double>(mass_[id]);
    }
    const bool has_enough = top_k > 0 ? static_cast<int64_t>(ordered_.size()) >= top_k
                                      : mass > target_share * (1 + 1e-9);
    if (has_enough || is_all) break;
  }
  if (top_k > 0 && top_k < static_cast<int64_t>(ordered_.size())) {
    std::nth_element(ordered_.begin(), ordered_.begin() + top_k, ordered_.end());
    ordered_.resize(static_cast<size_t>(top_k));
  }
  std::sort(ordered_.begin(), ordered_.end());
}

// Fills kept_ by top-k and top-p, in descending order of logits.
void TruncatedSampler::keep_sorted(int64_t top_k, float top_p, float max) {
  double total = 0;
  if (top_k <= 0) {
    for (const float mass : mass_) total += static_cast<double>(mass);
  }
  const double share = static_cast<double>(top_p);
  sort_candidates(max, top_k, share * total);
  if (top_k > 0) {
    for (const uint64_t key : ordered_) total += mass_of(id_of(key));
  }
  double running = 0;
  for (const uint64_t key : ordered_) {
    kept_.push_back(id_of(key));
    running += mass_of(id_of(key));
    if (top_p < 1.0f && running >= share * total) break;
  }
}

TruncatedDraw TruncatedSampler::draw(const KernelTable& kernels, std::span<const float> logits,
                                     float scale, const SamplingParams& sampling,
                                     std::span<const int32_t> banned, double u) {
  const auto V = static_cast<int64_t>(logits.size());
  scaled_.resize(logits.size());
  mass_.resize(logits.size());
  for (size_t id = 0; id < logits.size(); ++id) scaled_[id] = logits[id] * scale;
  for (const int32_t id : banned) {
    if (id >= 0 && id < V) scaled_[static_cast<size_t>(id)] = kLowest;
  }
  TruncatedDraw result;
  result.max = *std::max_element(scaled_.begin(), scaled_.end());
  if (result.max == kLowest) return result;
  kernels.shifted_exp(scaled_.data(), V, 1.0f, result.max, mass_.data());

  kept_.clear();
  const int64_t top_k = is_top_k_on(sampling, V) ? sampling.top_k : 0;
  if (top_k > 0 || sampling.top_p < 1.0f) {
    keep_sorted(top_k, sampling.top_p, result.max);
    std::sort(kept_.begin(), kept_.end());
  } else {
    for (int32_t id = 0; id < V; ++id) {
      if (scaled_[static_cast<size_t>(id)] != kLowest) kept_.push_back(id);
    }
  }
  if (sampling.min_p > 0.0f) {
    std::erase_if(kept_, [&](int32_t id) {
      return mass_[static_cast<size_t>(id)] < sampling.min_p;
    });
  }
  for (const int32_t id : kept_) result.kept += mass_of(id);
  result.is_whole = static_cast<int64_t>(kept_.size()) == V;
  const Pick pick = pick_item(static_cast<int64_t>(kept_.size()), 0, u * result.kept,
                              [&](int64_t i) { return mass_of(kept_[static_cast<size_t>(i)]); });
  result.token = kept_[static_cast<size_t>(pick.item)];
  return result;
}

int32_t TruncatedSampler::greedy(std::span<const float> logits, std::span<const int32_t> banned) {
  int32_t best = -1;
  for (int32_t id = 0; id < static_cast<int32_t>(logits.size()); ++id) {
    const float logit = logits[static_cast<size_t>(id)];
    if (best >= 0 && !(logit > logits[static_cast<size_t>(best)])) continue;
    if (std::binary_search(banned.begin(), banned.end(), id)) continue;
    best = id;
  }
  return best;
}

}  // namespace rollpack::kernels::cpu
