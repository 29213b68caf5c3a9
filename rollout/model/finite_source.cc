#include "rollout/model/finite_source.h"

#include <algorithm>
#include <cstring>

#include <fmt/format.h>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

// Bits of the least magnitude that is refused; as integers, magnitudes are ordered like the
// numbers.
constexpr int32_t kLimitF32 =
    0x7f7f8000;  // half-way above the largest bfloat16: rounds to infinity
constexpr int16_t kLimitF16 = 0x7c00;
constexpr int16_t kLimitBF16 = 0x7f80;

template <class Bits>
constexpr Bits kMagnitude = static_cast<Bits>(~(Bits{1} << (8 * sizeof(Bits) - 1)));

// Whether all of `count` elements are below `limit`. No early end: the compiler makes vectors of
// it, 16 bytes a cycle or better, and weights are as good as always finite.
template <class Bits>
bool are_below(const std::byte* elements, int64_t count, Bits limit) {
  Bits largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, elements + i * static_cast<int64_t>(sizeof bits), sizeof bits);
    largest = std::max(largest, static_cast<Bits>(bits & kMagnitude<Bits>));
  }
  return largest < limit;
}

bool are_finite(const std::byte* elements, DType dtype, int64_t count) {
  switch (dtype) {
    case DType::kF32:
      return are_below<int32_t>(elements, count, kLimitF32);
    case DType::kF16:
      return are_below<int16_t>(elements, count, kLimitF16);
    case DType::kBF16:
      return are_below<int16_t>(elements, count, kLimitBF16);
    default:
      return true;  // no dtype of weights: the backend refuses it by name
  }
}

float value_of(const std::byte* element, DType dtype) {
  if (dtype == DType::kF32) {
    float value;
    std::memcpy(&value, element, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, element, sizeof bits);
  return dtype == DType::kF16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

}  // namespace

const std::byte* FiniteSource::read_rows(int64_t begin, int64_t end,
                                         std::vector<std::byte>& scratch) const {
  const std::byte* elements = source_.read_rows(begin, end, scratch);
  const int64_t count = (end - begin) * cols;
  if (!are_finite(elements, dtype, count)) fail(elements, count, begin);
  return elements;
}

void FiniteSource::fail(const std::byte* elements, int64_t count, int64_t first_row) const {
  int64_t index = 0;
  const auto at = [&] { return elements + index * dtype_bytes(dtype); };
  while (index + 1 < count && are_finite(at(), dtype, 1)) ++index;
  const std::string where = rows == 1
                                ? fmt::format("[{}]", index)
                                : fmt::format("[{}, {}]", first_row + index / cols, index % cols);
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = name_ + where,
               .value = fmt::format("{}", value_of(at(), dtype)),
               .allowed = "a finite number, below 3.396e38, which is the end of bfloat16",
               .message = "weights that are not finite make no samples; the last finite ones stay "
                          "current. Look at the trainer's loss and gradients"});
}

}  // namespace rollpack::rollout
