#include "tests/trainer_bridge/layout/batch_reader.h"

#include <algorithm>

namespace rollpack::bridge::testing {
namespace {

using Bytes = std::span<const std::byte>;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// Little-endian, byte by byte.
uint64_t read_int(Bytes bytes, size_t offset, size_t size) {
  uint64_t value = 0;
  for (size_t b = size; b-- > 0;) {
    value = value << 8 | std::to_integer<uint64_t>(bytes[offset + b]);
  }
  return value;
}

std::string read_text(Bytes bytes) {
  std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const size_t end = std::min(text.find('\0'), text.size());
  require(text.find_first_not_of('\0', end) == std::string::npos, "text goes on after its zero");
  return text.substr(0, end);
}

bool is_zero(Bytes bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0}; });
}

uint64_t item_bytes(const std::string& dtype) {
  if (dtype == "<i4" || dtype == "<f4") return 4;
  if (dtype == "<i8") return 8;
  require(dtype == "|u1", "dtype " + dtype);
  return 1;
}

ReadColumn read_column(Bytes batch, Bytes entry, const std::string& name) {
  ReadColumn column;
  column.dtype = read_text(entry.subspan(48, 8));
  const uint64_t ndim = read_int(entry, 56, 4);
  column.alignment = static_cast<uint32_t>(read_int(entry, 60, 4));
  require(ndim >= 1 && ndim <= 4 && column.alignment <= 2, name + ": ndim or alignment");
  uint64_t expected = item_bytes(column.dtype);
  for (uint64_t d = 0; d < 4; ++d) {
    const uint64_t extent = read_int(entry, 64 + 8 * d, 8);
    if (d < ndim) {
      column.shape.push_back(extent);
      expected *= extent;
    } else {
      require(extent == 0, name + ": an extent behind ndim");
    }
  }
  column.offset = read_int(entry, 96, 8);
  const uint64_t num_bytes = read_int(entry, 104, 8);
  require(is_zero(entry.subspan(112, 16)), name + ": reserved bytes");
  require(num_bytes == expected, name + ": bytes do not follow from the shape");
  require(column.offset % 64 == 0, name + ": offset is not aligned");
  require(column.offset <= batch.size() && num_bytes <= batch.size() - column.offset,
          name + ": behind the end of the batch");
  const Bytes data = batch.subspan(column.offset, num_bytes);
  column.bytes.assign(data.begin(), data.end());
  return column;
}

}  // namespace

ReadBatch read_batch(Bytes bytes) {
  require(bytes.size() >= 64, "shorter than a header");
  require(read_text(bytes.first(8)) == "RPKBATCH", "magic");
  require(read_int(bytes, 8, 4) == 1, "schema_version");
  const uint64_t num_columns = read_int(bytes, 12, 4);
  ReadBatch batch;
  batch.batch_seq = read_int(bytes, 16, 8);
  batch.generation = read_int(bytes, 24, 8);
  batch.bytes = read_int(bytes, 32, 8);
  batch.crc32 = static_cast<uint32_t>(read_int(bytes, 40, 4));
  require(is_zero(bytes.subspan(44, 20)), "reserved bytes of the header");
  require(batch.bytes == bytes.size(), "bytes");

  uint64_t end = 64 + 128 * num_columns;
  require(end <= bytes.size(), "the table is cut off");
  for (uint64_t c = 0; c < num_columns; ++c) {
    const Bytes entry = bytes.subspan(64 + 128 * c, 128);
    const std::string name = read_text(entry.first(48));
    ReadColumn column = read_column(bytes, entry, name);
    require(column.offset >= end && column.offset < end + 64, name + ": overlap or hole");
    require(is_zero(bytes.subspan(end, column.offset - end)), name + ": gap is not 0");
    end = column.offset + column.bytes.size();
    batch.names.push_back(name);
    require(batch.columns.emplace(name, std::move(column)).second, name + " twice");
  }
  require(end == bytes.size(), "bytes behind the last column");
  return batch;
}

}  // namespace rollpack::bridge::testing
