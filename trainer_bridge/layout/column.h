// One column of a batch: what its table entry says, and how its values are written.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "trainer_bridge/contract/batch_schema.h"

namespace rollpack::bridge {

static_assert(std::endian::native == std::endian::little, "columns are written as they lie");

struct Column {
  std::string name;
  std::string dtype;  // NumPy's code
  Alignment alignment = Alignment::kNone;
  std::vector<uint64_t> shape;
  uint64_t bytes = 0;
  // Writes all `bytes` bytes; the memory is aligned to kColumnAlignment and holds anything before.
  std::function<void(std::byte*)> write;
};

template <class T>
constexpr const char* numpy_code() {
  if constexpr (std::is_same_v<T, int32_t>) {
    return "<i4";
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return "<i8";
  } else if constexpr (std::is_same_v<T, float>) {
    return "<f4";
  } else {
    static_assert(std::is_same_v<T, uint8_t>, "batch_schema.h names the dtypes");
    return "|u1";
  }
}

// A column of T; `fill(std::span<T>)` sets every element, in row-major order.
template <class T, class Fill>
Column make_column(std::string name, Alignment alignment, std::vector<uint64_t> shape, Fill fill) {
  uint64_t num_elements = 1;
  for (const uint64_t extent : shape) num_elements *= extent;
  Column column;
  column.name = std::move(name);
  column.dtype = numpy_code<T>();
  column.alignment = alignment;
  column.shape = std::move(shape);
  column.bytes = num_elements * sizeof(T);
  column.write = [fill = std::move(fill), num_elements](std::byte* out) {
    fill(std::span<T>(reinterpret_cast<T*>(out), num_elements));
  };
  return column;
}

}  // namespace rollpack::bridge
