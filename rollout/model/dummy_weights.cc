#include "rollout/model/dummy_weights.h"

#include <cstring>

#include "kernels/base/checksum.h"
#include "kernels/base/dtype.h"
#include "kernels/philox.h"

namespace rollpack::rollout {
namespace {

constexpr float kBound = 0.034641016f;  // 0.02 sqrt(3)

}  // namespace

DummySource::DummySource(std::string_view name, int64_t rows, int64_t cols)
    : WeightSource(DType::kBF16, rows, cols),
      key_(fnv1a64(name)),
      is_norm_(name.ends_with("norm.weight")) {}

const std::byte* DummySource::read_rows(int64_t begin, int64_t end,
                                        std::vector<std::byte>& scratch) const {
  const int64_t first = begin * cols, count = (end - begin) * cols;
  if (scratch.size() < static_cast<size_t>(count * 2))
    scratch.resize(static_cast<size_t>(count * 2));
  const uint16_t one = f32_to_bf16(1.0f);
  for (int64_t i = 0; i < count;) {
    const auto block = static_cast<uint64_t>(first + i) / 4;
    const auto words = kernels::philox4x32(
        {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0},
        {static_cast<uint32_t>(key_), static_cast<uint32_t>(key_ >> 32)});
    for (auto w = static_cast<size_t>(first + i) % 4; w < 4 && i < count; ++w, ++i) {
      const float u = static_cast<float>(words[w] >> 8) * 0x1p-23f - 1.0f;
      const uint16_t bits = is_norm_ ? one : f32_to_bf16(u * kBound);
      std::memcpy(scratch.data() + i * 2, &bits, 2);
    }
  }
  return scratch.data();
}

}  // namespace rollpack::rollout
