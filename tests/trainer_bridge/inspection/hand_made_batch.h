// Batches put together column by column, without the code that writes them: valid ones, and ones
// that say what no writer says.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "trainer_bridge/contract/batch_schema.h"

namespace rollpack::bridge::testing {

struct HandColumn {
  std::string name;
  std::string dtype;
  std::vector<uint64_t> shape;
  std::vector<std::byte> bytes;
  uint32_t alignment = 0;
};

template <class T>
HandColumn hand_column(std::string name, std::string dtype, const std::vector<T>& values,
                       std::vector<uint64_t> shape = {}) {
  HandColumn column{std::move(name), std::move(dtype), std::move(shape), {}};
  if (column.shape.empty()) column.shape = {values.size()};
  column.bytes.resize(values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(column.bytes.data(), values.data(), column.bytes.size());
  return column;
}
HandColumn i32_column(std::string name, const std::vector<int32_t>& values);
HandColumn u8_column(std::string name, const std::vector<uint8_t>& values);

// Three samples in two rows, prompt + response tokens 2 + 3, 1 + 2 | 4 + 0, of the prompts "a", "a"
// and "b<".
std::vector<HandColumn> packed_columns();
// The same as [3, 4 + 3].
std::vector<HandColumn> padded_columns();
// The column of that name, to be changed.
HandColumn& column_of(std::vector<HandColumn>& columns, const std::string& name);

// The bytes of a batch; header 12, generation 3.
std::vector<std::byte> batch_bytes(const std::vector<HandColumn>& columns);
// Makes size and checksum of the header fit what is there.
void stamp(std::vector<std::byte>& bytes);

template <class T>
void put(std::vector<std::byte>& bytes, size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

// Where entry `c` of the column table lies.
inline size_t entry_at(size_t c) {
  return sizeof(BatchHeader) + c * sizeof(ColumnEntry);
}

}  // namespace rollpack::bridge::testing
