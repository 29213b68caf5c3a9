#include "kernels/cpu/kv_pages.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "kernels/base/error.h"
#include "kernels/cpu/kernel_table.h"

namespace rollpack::kernels::cpu {

KvPages::KvPages(const ModelShape& shape, int64_t kv_cache_bytes) : G_(shape.G), K_(shape.K) {
  const bool is_bf16 = shape.dtype == DType::kBF16;
  score_steps_ = is_bf16 ? K_ / 2 : K_;
  value_columns_ = (K_ + 15) / 16 * 16;
  key_bytes_ = score_steps_ * kPageTokens * 4;
  block_bytes_ = key_bytes_ + kPageTokens * value_columns_ * dtype_bytes(shape.dtype);
  page_bytes_ = shape.L * G_ * block_bytes_;
  const int64_t pages = kv_cache_bytes / page_bytes_;
  if (pages < 1) {
    throw Error({.code = ErrorCode::kResourceExhausted,
                 .field = "engine.kv_cache_memory",
                 .value = fmt::format("{} bytes", kv_cache_bytes),
                 .allowed = fmt::format("at least {} bytes", page_bytes_),
                 .message = fmt::format("one page holds {} tokens of all {} layers", kPageTokens,
                                        shape.L)});
  }
  num_pages_ = static_cast<int32_t>(
      std::min<int64_t>(pages, std::numeric_limits<int32_t>::max() / 2));
  arena_ = Arena::make_private(num_pages_ * page_bytes_, "engine.kv_cache_memory");
}

template <>
void KvPages::write(int32_t page, int64_t layer, int64_t head, int32_t slot, const uint16_t* k,
                    const uint16_t* v) const {
  uint16_t* key = keys<uint16_t>(page, layer, head) + slot * 2;
  for (int64_t i = 0; i < K_; ++i) key[(i / 2) * kPageTokens * 2 + i % 2] = k[i];
  uint16_t* value = values<uint16_t>(page, layer, head) + (slot / 2) * value_columns_ * 2 + slot % 2;
  for (int64_t i = 0; i < K_; ++i) value[i * 2] = v[i];
}

template <>
void KvPages::write(int32_t page, int64_t layer, int64_t head, int32_t slot, const float* k,
                    const float* v) const {
  float* key = keys<float>(page, layer, head) + slot;
  for (int64_t i = 0; i < K_; ++i) key[i * kPageTokens] = k[i];
  float* value = values<float>(page, layer, head) + slot * value_columns_;
  for (int64_t i = 0; i < K_; ++i) value[i] = v[i];
}

}  // namespace rollpack::kernels::cpu
