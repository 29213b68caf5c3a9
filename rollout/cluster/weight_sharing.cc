#include "rollout/cluster/weight_sharing.h"

#include <fstream>
#include <string>

#include <fmt/format.h>

namespace rollpack::rollout {
namespace {

// The kernel marks the setting in force: "always within_size advise [never] deny force".
bool has_shared_huge_pages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  std::string line;
  std::getline(file, line);
  for (const char* setting : {"[always]", "[within_size]", "[advise]", "[force]"}) {
    if (line.find(setting) != std::string::npos) return true;
  }
  return false;
}

int64_t available_memory_bytes() {
  std::ifstream file("/proc/meminfo");
  std::string name, unit;
  int64_t kibibytes = 0;
  while (file >> name >> kibibytes) {
    std::getline(file, unit);
    if (name == "MemAvailable:") return kibibytes << 10;
  }
  return 0;
}

}  // namespace

WeightSharing decide_weight_sharing(const std::string& setting, int num_ranks,
                                    int64_t weight_bytes) {
  if (num_ranks == 1) return {false, "one rank"};
  if (setting != "auto") return {setting == "on", "engine.share_weights: " + setting};
  if (has_shared_huge_pages()) return {true, "shared memory has huge pages"};
  // An update needs a second copy beside the live one; half of what is free is left to the rest.
  const int64_t private_bytes = 2 * num_ranks * weight_bytes;
  if (private_bytes > available_memory_bytes() / 2) {
    return {true, fmt::format("private copies would need {} bytes", private_bytes)};
  }
  return {false, "shared memory has no huge pages here: private copies stream faster"};
}

int64_t weight_bytes(const ModelConfig& model, DType dtype) {
  const int64_t D = model.hidden_size, F = model.intermediate_size, K = model.head_dim;
  const int64_t attention = (2 * model.num_attention_heads + 2 * model.num_key_value_heads) * K * D;
  const int64_t vocabulary = model.vocab_size * D * (model.tie_word_embeddings ? 1 : 2);
  return (model.num_hidden_layers * (attention + 3 * D * F) + vocabulary) * dtype_bytes(dtype);
}

}  // namespace rollpack::rollout
