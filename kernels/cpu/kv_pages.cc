#include "kernels/cpu/kv_pages.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/base/error.h"
#include "kernels/cpu/kernel_table.h"

namespace rollpack::kernels::cpu {

KvPages::KvPages(const ModelShape& shape, int64_t kv_cache_bytes) : G_(shape.G), K_(shape.K) {
  is_bf16_ = shape.dtype == DType::kBF16;
  score_steps_ = is_bf16_ ? K_ / 2 : K_;
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
  num_pages_ =
      static_cast<int32_t>(std::min<int64_t>(pages, std::numeric_limits<int32_t>::max() / 2));
  arena_ = Arena::make_private(num_pages_ * page_bytes_, "engine.kv_cache_memory");
}

template <>
void KvPages::write(int32_t page, int64_t layer, int64_t head, int32_t slot, const uint16_t* k,
                    const uint16_t* v) const {
  uint16_t* key = keys<uint16_t>(page, layer, head) + slot * 2;
  for (int64_t i = 0; i < K_; i += 2) std::memcpy(key + i * kPageTokens, k + i, 4);
  uint16_t* value =
      values<uint16_t>(page, layer, head) + (slot / 2) * value_columns_ * 2 + slot % 2;
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

void KvPages::prefetch(int32_t page, int64_t layer, int64_t head, int32_t slot) const {
  const std::byte* const keys = block(page, layer, head);
  // A step of 16 tokens is a line, and so are 16 columns of a row of values, whatever the dtype.
  for (int64_t step = 0; step < score_steps_; ++step) __builtin_prefetch(keys + step * 64, 1, 3);
  const int32_t tokens_per_row = is_bf16_ ? 2 : 1;
  const std::byte* const values = keys + key_bytes_ + slot / tokens_per_row * value_columns_ * 4;
  for (int64_t c = 0; c < value_columns_; c += 16) __builtin_prefetch(values + c * 4, 1, 3);
}

void KvPages::copy_block(int64_t block, const PageCopy& copy) const {
  const std::byte* source = this->block(copy.source, block / G_, block % G_);
  std::byte* target = this->block(copy.target, block / G_, block % G_);
  if (copy.num_tokens == kPageTokens) {
    std::memcpy(target, source, static_cast<size_t>(block_bytes_));
    return;
  }
  // A step of keys holds 4 bytes of each of the 16 tokens, whatever the dtype.
  const auto key_bytes = static_cast<size_t>(copy.num_tokens) * 4;
  for (int64_t step = 0; step < score_steps_; ++step) {
    const int64_t at = step * kPageTokens * 4;
    std::memcpy(target + at, source + at, key_bytes);
  }
  const int32_t tokens_per_row = is_bf16_ ? 2 : 1;
  const int64_t row_bytes = value_columns_ * 4;
  const int64_t whole = copy.num_tokens / tokens_per_row;  // rows of tokens copied entirely
  std::memcpy(target + key_bytes_, source + key_bytes_, static_cast<size_t>(whole * row_bytes));
  if (copy.num_tokens % tokens_per_row == 0) return;
  const std::byte* in = source + key_bytes_ + whole * row_bytes;
  std::byte* out = target + key_bytes_ + whole * row_bytes;
  for (int64_t c = 0; c < value_columns_; ++c) std::memcpy(out + c * 4, in + c * 4, 2);
}

}  // namespace rollpack::kernels::cpu
