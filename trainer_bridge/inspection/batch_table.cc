#include "trainer_bridge/inspection/batch_table.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <set>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"

namespace rollpack::bridge {
namespace {

struct Dtype {
  std::string_view code;
  uint64_t item_bytes;
};
constexpr std::array<Dtype, 4> kDtypes = {{{"<i4", 4}, {"<i8", 8}, {"<f4", 4}, {"|u1", 1}}};

[[noreturn]] void refuse(const std::string& origin, std::string field, std::string value,
                         std::string allowed, std::string message = "") {
  throw Error({.code = ErrorCode::kDataLoss,
               .field = std::move(field),
               .value = std::move(value),
               .origin = origin,
               .allowed = std::move(allowed),
               .message = std::move(message)});
}

template <class T>
T value_at(std::span<const std::byte> bytes, uint64_t i) {
  T value;
  std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
  return value;
}

// The text of a field padded with NULs, which must be all that follows it.
template <size_t N>
std::string padded_text(const std::array<char, N>& field, const std::string& origin,
                        const std::string& what) {
  const auto end = std::find(field.begin(), field.end(), '\0');
  const std::string text(field.begin(), end);
  const bool is_plain =
      std::all_of(text.begin(), text.end(), [](char c) { return c > 32 && c < 127; });
  const bool is_padded = std::all_of(end, field.end(), [](char c) { return c == '\0'; });
  if (text.empty() || end == field.end() || !is_plain || !is_padded) {
    refuse(origin, what, is_plain ? '"' + text + '"' : "other bytes",
           fmt::format("1 to {} printable ASCII characters, then zeros", N - 1));
  }
  return text;
}

template <size_t N>
void check_zero(const std::array<uint8_t, N>& reserved, const std::string& origin,
                const std::string& what) {
  if (std::all_of(reserved.begin(), reserved.end(), [](uint8_t byte) { return byte == 0; })) return;
  refuse(origin, what, "other bytes", "zeros", "a later version may have written it");
}

class EntryReader {
 public:
  EntryReader(std::span<const std::byte> bytes, uint64_t table_end, const std::string& origin)
      : bytes_(bytes), table_end_(table_end), origin_(origin) {}

  TableColumn read(uint32_t number) {
    const auto entry = value_at<ColumnEntry>(bytes_.subspan(sizeof(BatchHeader)), number);
    const std::string nth = fmt::format("columns[{}]", number);
    TableColumn column;
    column.name = padded_text(entry.name, origin_, nth + ".name");
    what_ = fmt::format("{} ({})", nth, column.name);
    if (!names_.insert(column.name).second) {
      refuse(origin_, nth + ".name", column.name, "each name once");
    }
    column.dtype = padded_text(entry.dtype, origin_, what_ + ".dtype");
    column.alignment = alignment_of(entry);
    column.shape = shape_of(entry);
    check_bytes(entry, column);
    check_zero(entry.reserved, origin_, what_ + ".reserved");
    column.bytes = place_of(entry);
    return column;
  }

 private:
  Alignment alignment_of(const ColumnEntry& entry) const {
    if (entry.alignment <= static_cast<uint32_t>(Alignment::kPredictor)) {
      return static_cast<Alignment>(entry.alignment);
    }
    refuse(origin_, what_ + ".alignment", std::to_string(entry.alignment),
           "0 (none), 1 (token) or 2 (predictor)");
  }

  std::vector<uint64_t> shape_of(const ColumnEntry& entry) const {
    if (entry.ndim < 1 || entry.ndim > entry.shape.size()) {
      refuse(origin_, what_ + ".ndim", std::to_string(entry.ndim),
             fmt::format("1 to {}", entry.shape.size()));
    }
    const auto end = entry.shape.begin() + entry.ndim;
    if (std::any_of(end, entry.shape.end(), [](uint64_t extent) { return extent != 0; })) {
      refuse(origin_, what_ + ".shape", fmt::format("[{}]", fmt::join(entry.shape, ", ")),
             fmt::format("zeros behind its {} extents", entry.ndim));
    }
    return {entry.shape.begin(), end};
  }

  void check_bytes(const ColumnEntry& entry, const TableColumn& column) const {
    const auto dtype = std::find_if(kDtypes.begin(), kDtypes.end(),
                                    [&](const Dtype& each) { return each.code == column.dtype; });
    if (dtype == kDtypes.end()) {
      refuse(origin_, what_ + ".dtype", column.dtype, "<i4, <i8, <f4 or |u1");
    }
    uint64_t expected = dtype->item_bytes;
    bool overflows = false;
    for (const uint64_t extent : column.shape) {
      overflows |= __builtin_mul_overflow(expected, extent, &expected);
    }
    if (!overflows && expected == entry.bytes) return;
    refuse(origin_, what_ + ".bytes", std::to_string(entry.bytes),
           overflows ? "a shape whose bytes fit 64 bits"
                     : fmt::format("{}, as {} [{}] takes", expected, column.dtype,
                                   fmt::join(column.shape, ", ")));
  }

  std::span<const std::byte> place_of(const ColumnEntry& entry) const {
    const uint64_t size = bytes_.size();
    if (entry.offset >= table_end_ && entry.offset % kColumnAlignment == 0 &&
        entry.offset <= size && entry.bytes <= size - entry.offset) {
      return bytes_.subspan(entry.offset, entry.bytes);
    }
    refuse(origin_, what_ + ".offset", std::to_string(entry.offset),
           fmt::format("a multiple of {} from {} with {} bytes before {}", kColumnAlignment,
                       table_end_, entry.bytes, size));
  }

  std::span<const std::byte> bytes_;
  uint64_t table_end_;
  const std::string& origin_;
  std::set<std::string> names_;
  std::string what_;
};

void check_overlaps(const BatchTable& table) {
  std::vector<const TableColumn*> in_order;
  for (const TableColumn& column : table.columns) {
    if (!column.bytes.empty()) in_order.push_back(&column);
  }
  std::stable_sort(
      in_order.begin(), in_order.end(),
      [](const TableColumn* a, const TableColumn* b) { return a->bytes.data() < b->bytes.data(); });
  for (size_t i = 1; i < in_order.size(); ++i) {
    const TableColumn &before = *in_order[i - 1], &column = *in_order[i];
    if (before.bytes.data() + before.bytes.size() <= column.bytes.data()) continue;
    refuse(table.origin, "columns", before.name + " and " + column.name, "columns apart",
           "they overlap");
  }
}

}  // namespace

uint64_t TableColumn::num_elements() const {
  uint64_t number = 1;
  for (const uint64_t extent : shape) number *= extent;  // checked when the table was read
  return number;
}

int64_t TableColumn::integer(uint64_t i) const {
  if (dtype == "<i4") return value_at<int32_t>(bytes, i);
  if (dtype == "<i8") return value_at<int64_t>(bytes, i);
  if (dtype == "|u1") return value_at<uint8_t>(bytes, i);
  fail_invariant("column " + name + " is read as integers");
}

float TableColumn::real(uint64_t i) const {
  if (dtype == "<f4") return value_at<float>(bytes, i);
  fail_invariant("column " + name + " is read as floats");
}

const TableColumn* BatchTable::find(std::string_view name) const {
  const auto found = std::find_if(columns.begin(), columns.end(),
                                  [&](const TableColumn& column) { return column.name == name; });
  return found == columns.end() ? nullptr : &*found;
}

const TableColumn& BatchTable::column(std::string_view name, std::string_view dtype,
                                      size_t ndim) const {
  const TableColumn* found = find(name);
  if (found != nullptr && found->dtype == dtype && found->shape.size() == ndim) return *found;
  refuse(origin, fmt::format("column {}", name),
         found == nullptr ? "missing"
                          : fmt::format("{} [{}]", found->dtype, fmt::join(found->shape, ", ")),
         fmt::format("{} with {} dimension{}", dtype, ndim, ndim == 1 ? "" : "s"));
}

BatchHeader read_batch_header(std::span<const std::byte> bytes, uint64_t num_bytes,
                              const std::string& origin) {
  if (bytes.size() < sizeof(BatchHeader)) {
    refuse(origin, "batch", fmt::format("{} bytes", bytes.size()),
           fmt::format("at least the {} of a header", sizeof(BatchHeader)));
  }
  const auto header = value_at<BatchHeader>(bytes, 0);
  if (header.magic != kBatchMagic) {
    const std::string_view magic(header.magic.data(), header.magic.size());
    const bool is_plain =
        std::all_of(magic.begin(), magic.end(), [](char c) { return c >= 32 && c < 127; });
    refuse(origin, "magic", is_plain ? std::string(magic) : "other bytes",
           std::string(kBatchMagic.data(), kBatchMagic.size()), "this is no batch");
  }
  if (header.schema_version != kSchemaVersion) {
    throw Error({.code = ErrorCode::kUnsupported,
                 .field = "schema_version",
                 .value = std::to_string(header.schema_version),
                 .origin = origin,
                 .allowed = std::to_string(kSchemaVersion),
                 .message = "use the rollpack that wrote it"});
  }
  check_zero(header.reserved, origin, "header.reserved");
  if (header.bytes != num_bytes) {
    refuse(origin, "bytes", std::to_string(header.bytes), std::to_string(num_bytes),
           header.bytes > num_bytes ? "the end is missing" : "something follows the batch");
  }
  const uint64_t table_end =
      sizeof(BatchHeader) + uint64_t{header.num_columns} * sizeof(ColumnEntry);
  if (table_end > num_bytes) {
    refuse(origin, "num_columns", std::to_string(header.num_columns),
           fmt::format("at most {}, by the size",
                       (num_bytes - sizeof(BatchHeader)) / sizeof(ColumnEntry)));
  }
  return header;
}

BatchTable read_batch_table(std::span<const std::byte> bytes, const std::string& origin) {
  BatchTable table{.origin = origin, .header = read_batch_header(bytes, bytes.size(), origin)};
  const uint32_t crc32 = crc32_of(bytes.subspan(sizeof(BatchHeader)));
  if (crc32 != table.header.crc32) {
    refuse(origin, "crc32", fmt::format("{:#010x}", table.header.crc32),
           fmt::format("{:#010x}, that of the bytes", crc32), "they are not what was written");
  }
  const uint64_t table_end =
      sizeof(BatchHeader) + uint64_t{table.header.num_columns} * sizeof(ColumnEntry);
  EntryReader reader(bytes, table_end, origin);
  for (uint32_t i = 0; i < table.header.num_columns; ++i) table.columns.push_back(reader.read(i));
  check_overlaps(table);
  return table;
}

}  // namespace rollpack::bridge
