// The bytes of a batch: a 64-byte header, 128 bytes a column, then the columns, each aligned to 64
// bytes; little-endian throughout. trainer_bridge/README.md lists the columns of each layout.
#pragma once

#include <array>
#include <cstdint>

namespace rollpack::bridge {

inline constexpr std::array<char, 8> kBatchMagic = {'R', 'P', 'K', 'B', 'A', 'T', 'C', 'H'};
inline constexpr uint32_t kSchemaVersion = 1;
inline constexpr int64_t kColumnAlignment = 64;

// What an entry of a per-token column describes.
enum class Alignment : uint32_t {
  kNone = 0,
  kToken = 1,      // entry t is about token t
  kPredictor = 2,  // entry t is about token t + 1
};

struct BatchHeader {
  std::array<char, 8> magic = kBatchMagic;
  uint32_t schema_version = kSchemaVersion;
  uint32_t num_columns = 0;
  uint64_t batch_seq = 0;   // counts batches, from 1, never reused
  uint64_t generation = 0;  // counts fillings of this slot
  uint64_t bytes = 0;       // of the whole batch, header included
  uint32_t crc32 = 0;       // zlib's, of all bytes after the header
  std::array<uint8_t, 20> reserved = {};
};
static_assert(sizeof(BatchHeader) == 64);

struct ColumnEntry {
  std::array<char, 48> name = {};
  std::array<char, 8> dtype = {};  // NumPy's code: "<i4", "<i8", "<f4", "|u1"
  uint32_t ndim = 0;
  uint32_t alignment = 0;
  std::array<uint64_t, 4> shape = {};
  uint64_t offset = 0;  // from the start of the batch
  uint64_t bytes = 0;
  std::array<uint8_t, 16> reserved = {};
};
static_assert(sizeof(ColumnEntry) == 128);

}  // namespace rollpack::bridge
