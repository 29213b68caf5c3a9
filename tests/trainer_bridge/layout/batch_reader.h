// Reads a batch as a stranger would: from the byte offsets that design and README state, without
// the structs and the column list of the code under test.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace rollpack::bridge::testing {

struct ReadColumn {
  std::string dtype;
  uint32_t alignment = 0;
  std::vector<uint64_t> shape;
  uint64_t offset = 0;
  std::vector<std::byte> bytes;
};

struct ReadBatch {
  uint64_t batch_seq = 0;
  uint64_t generation = 0;
  uint64_t bytes = 0;
  uint32_t crc32 = 0;
  std::vector<std::string> names;  // in the order of the table
  std::map<std::string, ReadColumn> columns;

  const ReadColumn& column(const std::string& name) const {
    const auto found = columns.find(name);
    if (found == columns.end()) throw std::runtime_error("no column " + name);
    return found->second;
  }

  // Values of a column, row-major. Throws where the table states another dtype.
  template <class T>
  std::vector<T> values(const std::string& name) const {
    const ReadColumn& read = column(name);
    const std::string code = std::is_same_v<T, int32_t>   ? "<i4"
                             : std::is_same_v<T, int64_t> ? "<i8"
                             : std::is_same_v<T, float>   ? "<f4"
                                                          : "|u1";
    if (read.dtype != code) throw std::runtime_error(name + " is " + read.dtype);
    std::vector<T> values(read.bytes.size() / sizeof(T));
    if (!values.empty()) std::memcpy(values.data(), read.bytes.data(), read.bytes.size());
    return values;
  }
};

// Throws std::runtime_error for bytes that are no batch: magic, version, reserved bytes that are
// not 0, columns that overlap, do not follow their shape or leave gaps that are not 0.
ReadBatch read_batch(std::span<const std::byte> bytes);

}  // namespace rollpack::bridge::testing
