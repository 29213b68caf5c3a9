#include "rollout/measurement/roofline.h"

#include <algorithm>

namespace rollpack::rollout {

ModelCost::ModelCost(const ModelConfig& model, DType dtype)
    : num_layers_(model.num_hidden_layers),
      element_bytes_(static_cast<double>(dtype_bytes(dtype))) {
  const auto D = static_cast<double>(model.hidden_size), K = static_cast<double>(model.head_dim);
  const auto H = static_cast<double>(model.num_attention_heads);
  const auto G = static_cast<double>(model.num_key_value_heads);
  const auto F = static_cast<double>(model.intermediate_size);
  layer_parameters_ = (2 * H + 2 * G) * K * D + 3 * D * F;
  head_parameters_ = D * static_cast<double>(model.vocab_size);
  pair_flops_ = 4 * H * K;
  for (const int32_t window : model.layer_windows) {
    const auto same = std::ranges::find(windows_, window, &WindowLayers::window);
    if (same == windows_.end()) {
      windows_.push_back({.window = window, .num_layers = 1});
    } else {
      ++same->num_layers;
    }
  }
}

double ModelCost::attention_flops(int64_t begin, int64_t end) const {
  double pairs = 0;
  for (const auto& [window, num_layers] : windows_) {
    pairs += num_layers * visible_pairs(begin, end, window);
  }
  return pair_flops_ * pairs;
}

double visible_pairs(int64_t begin, int64_t end, int32_t window) {
  // Row p sees p + 1 keys, or the window where that is less.
  const int64_t full = window == 0 ? end : std::clamp<int64_t>(window, begin, end);
  const auto n = static_cast<double>(full - begin);
  return n * static_cast<double>(begin) + n * (n + 1) / 2 +
         static_cast<double>(end - full) * window;
}

}  // namespace rollpack::rollout
