// Every way in which a batch from outside can lie about itself is an error that says where.
#include "trainer_bridge/inspection/batch_table.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>

#include "tests/error_text.h"
#include "tests/trainer_bridge/inspection/hand_made_batch.h"
#include "tests/trainer_bridge/layout/example_samples.h"
#include "trainer_bridge/inspection/batch_contents.h"
#include "trainer_bridge/inspection/svg_drawing.h"
#include "trainer_bridge/inspection/text_drawing.h"
#include "trainer_bridge/layout/batch_layout.h"

namespace rollpack::bridge {
namespace {

using namespace testing;
using rollpack::testing::error_text;
using Bytes = std::vector<std::byte>;

std::string error_of(const Bytes& bytes) {
  return error_text([&] { read_batch_table(bytes, "F"); });
}

std::string error_with(const std::function<void(Bytes&)>& change, bool is_stamped = true) {
  Bytes bytes = batch_bytes(packed_columns());
  change(bytes);
  if (is_stamped) stamp(bytes);
  return error_of(bytes);
}

// Writes `value` at `offset` of the entry of column 3, cu_seqlens.
template <class T>
std::string error_with_entry(size_t offset, T value) {
  return error_with([&](Bytes& bytes) { put(bytes, entry_at(3) + offset, value); });
}

TEST(BatchTable, ReadsWhatAHandMadeBatchSays) {
  const Bytes bytes = batch_bytes(packed_columns());
  const BatchTable table = read_batch_table(bytes, "F");
  EXPECT_EQ(table.header.batch_seq, 12u);
  EXPECT_EQ(table.columns.size(), 19u);
  EXPECT_EQ(table.columns[3].name, "cu_seqlens");
  EXPECT_EQ(table.columns[3].integer(2), 8);
  EXPECT_EQ(table.column("temperature", "<f4").real(1), 1.0f);
  EXPECT_EQ(table.find("rewards"), nullptr);
}

TEST(BatchTable, AFileCutAnywhereIsRefused) {
  const Bytes whole = batch_bytes(packed_columns());
  for (size_t bytes = 0; bytes < whole.size(); ++bytes) {
    const Bytes cut(whole.begin(), whole.begin() + static_cast<int64_t>(bytes));
    const std::string expected = bytes < sizeof(BatchHeader)
                                     ? "data_loss: batch = " + std::to_string(bytes) +
                                           " bytes (F): expected at least the 64 of a header"
                                     : "data_loss: bytes = " + std::to_string(whole.size()) +
                                           " (F): expected " + std::to_string(bytes) +
                                           "; the end is missing";
    ASSERT_EQ(error_of(cut), expected);
  }
}

TEST(BatchTable, AnyBitFlippedBehindTheHeaderIsRefused) {
  Bytes bytes = batch_bytes(packed_columns());
  for (size_t at = sizeof(BatchHeader); at < bytes.size(); ++at) {
    bytes[at] ^= std::byte{1};
    ASSERT_NE(error_of(bytes).find("data_loss: crc32 = "), std::string::npos) << at;
    bytes[at] ^= std::byte{1};
  }
}

TEST(BatchTable, HeaderErrorsNameTheField) {
  EXPECT_EQ(error_with([](Bytes& bytes) { put(bytes, 0, 'X'); }),
            "data_loss: magic = XPKBATCH (F): expected RPKBATCH; this is no batch");
  EXPECT_EQ(error_with([](Bytes& bytes) { put(bytes, 0, '\x1f'); }),
            "data_loss: magic = other bytes (F): expected RPKBATCH; this is no batch");
  EXPECT_EQ(error_with([](Bytes& bytes) { put(bytes, 8, uint32_t{2}); }),
            "unsupported: schema_version = 2 (F): expected 1; use the rollpack that wrote it");
  EXPECT_EQ(error_with([](Bytes& bytes) { put(bytes, 12, ~uint32_t{0}); }),
            "data_loss: num_columns = 4294967295 (F): expected at most 28, by the size");
  EXPECT_EQ(error_with([](Bytes& bytes) { put(bytes, 63, uint8_t{1}); }),
            "data_loss: header.reserved = other bytes (F): expected zeros; a later version may "
            "have written it");
  EXPECT_EQ(error_with([](Bytes& bytes) { bytes.resize(bytes.size() + 1); }, false),
            "data_loss: bytes = 3660 (F): expected 3661; something follows the batch");
  EXPECT_NE(error_with([](Bytes& bytes) { put(bytes, 40, uint32_t{7}); }, false)
                .find("data_loss: crc32 = 0x00000007 (F): expected 0x"),
            std::string::npos);
}

TEST(BatchTable, ColumnsOutOfRangeAreRefused) {
  const std::string place = "expected a multiple of 64 from 2496 with 16 bytes before 3660";
  for (const uint64_t offset : {uint64_t{0}, uint64_t{64}, uint64_t{2501}, uint64_t{4480},
                                uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{0} - 63}) {
    EXPECT_EQ(
        error_with_entry(offsetof(ColumnEntry, offset), offset),
        "data_loss: columns[3] (cu_seqlens).offset = " + std::to_string(offset) + " (F): " + place);
  }
}

TEST(BatchTable, OverlappingColumnsAreRefused) {
  EXPECT_EQ(error_with_entry(offsetof(ColumnEntry, offset), uint64_t{2496}),
            "data_loss: columns = input_ids and cu_seqlens (F): expected columns apart; they "
            "overlap");
}

TEST(BatchTable, AbsurdShapesAreRefused) {
  EXPECT_EQ(error_with_entry(offsetof(ColumnEntry, ndim), uint32_t{0}),
            "data_loss: columns[3] (cu_seqlens).ndim = 0 (F): expected 1 to 4");
  EXPECT_EQ(error_with_entry(offsetof(ColumnEntry, ndim), uint32_t{5}),
            "data_loss: columns[3] (cu_seqlens).ndim = 5 (F): expected 1 to 4");
  EXPECT_EQ(error_with_entry(offsetof(ColumnEntry, shape), uint64_t{5}),
            "data_loss: columns[3] (cu_seqlens).bytes = 16 (F): expected 20, as <i4 [5] takes");
  EXPECT_EQ(error_with_entry(offsetof(ColumnEntry, shape) + 8, uint64_t{1}),
            "data_loss: columns[3] (cu_seqlens).shape = [4, 1, 0, 0] (F): expected zeros behind "
            "its 1 extents");
  // 4194305 x 4194305 x 211106198978564 x 4 bytes are 16 modulo 2^64.
  EXPECT_EQ(error_with([](Bytes& bytes) {
              const size_t shape = entry_at(3) + offsetof(ColumnEntry, shape);
              put(bytes, entry_at(3) + offsetof(ColumnEntry, ndim), uint32_t{3});
              put(bytes, shape, uint64_t{4194305});
              put(bytes, shape + 8, uint64_t{4194305});
              put(bytes, shape + 16, uint64_t{211106198978564});
            }),
            "data_loss: columns[3] (cu_seqlens).bytes = 16 (F): expected a shape whose bytes fit "
            "64 bits");
}

TEST(BatchTable, NamesDtypesAndAlignmentsOutsideTheSchemaAreRefused) {
  EXPECT_EQ(error_with_entry(0, '\0'),
            "data_loss: columns[3].name = \"\" (F): expected 1 to 47 printable ASCII characters, "
            "then zeros");
  EXPECT_EQ(error_with_entry(0, '\x1b'),
            "data_loss: columns[3].name = other bytes (F): expected 1 to 47 printable ASCII "
            "characters, then zeros");
  EXPECT_EQ(error_with_entry(20, 'x'),
            "data_loss: columns[3].name = \"cu_seqlens\" (F): expected 1 to 47 printable ASCII "
            "characters, then zeros");
  EXPECT_EQ(error_with([](Bytes& bytes) {
              for (size_t i = 0; i < 48; ++i)
                put(bytes, entry_at(3) + i, i < 11 ? "row_starts"[i] : '\0');
            }),
            "data_loss: columns[4].name = row_starts (F): expected each name once");
  EXPECT_EQ(error_with_entry(offsetof(ColumnEntry, dtype), '>'),
            "data_loss: columns[3] (cu_seqlens).dtype = >i4 (F): expected <i4, <i8, <f4 or |u1");
  EXPECT_EQ(error_with_entry(offsetof(ColumnEntry, alignment), uint32_t{3}),
            "data_loss: columns[3] (cu_seqlens).alignment = 3 (F): expected 0 (none), 1 (token) or "
            "2 (predictor)");
  EXPECT_EQ(
      error_with_entry(127, uint8_t{1}),
      "data_loss: columns[3] (cu_seqlens).reserved = other bytes (F): expected zeros; a later "
      "version may have written it");
}

// Bytes of header and table overwritten at random, under a checksum that fits: read or refused, and
// what is read can be drawn.
TEST(BatchTable, RandomTablesAreReadOrRefused) {
  std::mt19937 random(1);
  int num_refused = 0;
  for (int i = 0; i < 3000; ++i) {
    Bytes bytes = batch_bytes(i % 2 == 0 ? packed_columns() : padded_columns());
    for (int change = 0; change < 3; ++change) {
      const size_t at = 8 + random() % (bytes.size() - 8);
      bytes[at] = static_cast<std::byte>(random() % 3 == 0 ? random() : 0xff);
    }
    stamp(bytes);
    const std::string error = error_text([&] {
      const BatchTable table = read_batch_table(bytes, "F");
      const BatchContents contents = read_batch_contents(table);
      text_drawing(table, contents, "", {});
      svg_drawing(table, contents, "", {});
    });
    num_refused += error != "no error";
    EXPECT_EQ(error.find("internal"), std::string::npos) << error;
  }
  EXPECT_GT(num_refused, 1000);
}

}  // namespace
}  // namespace rollpack::bridge
