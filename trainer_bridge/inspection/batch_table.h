// Header and column table of a batch that somebody else wrote, checked before anything is believed:
// a file may be cut, altered or made up. Shares contract/batch_schema.h with the writer in layout/,
// and nothing else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "trainer_bridge/contract/batch_schema.h"

namespace rollpack::bridge {

struct TableColumn {
  std::string name;
  std::string dtype;  // NumPy's code
  Alignment alignment = Alignment::kNone;
  std::vector<uint64_t> shape;
  std::span<const std::byte> bytes;  // in the memory that was read

  uint64_t num_elements() const;
  // Element i in row-major order, below num_elements(): of an integer column widened, of a float
  // column as it is. Broken invariants (internal) for the other kind.
  int64_t integer(uint64_t i) const;
  float real(uint64_t i) const;
};

struct BatchTable {
  std::string origin;  // how errors name the batch
  BatchHeader header;
  std::vector<TableColumn> columns;  // in the order of the table

  // The column, or null.
  const TableColumn* find(std::string_view name) const;
  // Errors: data_loss where there is none of that name, or with another dtype or rank.
  const TableColumn& column(std::string_view name, std::string_view dtype, size_t ndim = 1) const;
};

// Reads header and table of `bytes`, the whole batch, which outlive the result.
//   origin  the file or slot, for errors
// Errors, all naming origin and field: data_loss for fewer bytes than a header or than it says, for
// more, for another magic or checksum, for bytes that must be 0 and are not, and for an entry that
// contradicts itself, another one or the size; unsupported for another schema version.
BatchTable read_batch_table(std::span<const std::byte> bytes, const std::string& origin);

// The header alone, against the size of what it heads, before that much memory is asked for.
//   num_bytes  of the whole batch
// Errors: those of read_batch_table() but for checksum and table.
BatchHeader read_batch_header(std::span<const std::byte> bytes, uint64_t num_bytes,
                              const std::string& origin);

}  // namespace rollpack::bridge
