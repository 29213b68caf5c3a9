#include <gtest/gtest.h>

#include <sstream>

#include "tests/error_text.h"
#include "tests/trainer_bridge/inspection/hand_made_batch.h"
#include "tests/trainer_bridge/layout/example_samples.h"
#include "tests/trainer_bridge/layout/written_batch.h"
#include "trainer_bridge/inspection/svg_drawing.h"
#include "trainer_bridge/inspection/text_drawing.h"
#include "trainer_bridge/inspection/visible_pairs.h"

namespace rollpack::bridge {
namespace {

using namespace testing;
using rollpack::testing::error_text;

class Drawn {
 public:
  explicit Drawn(std::vector<std::byte> bytes)
      : bytes_(std::move(bytes)),
        table_(read_batch_table(bytes_, "F")),
        contents_(read_batch_contents(table_)) {}

  std::string text(const DrawingOptions& options = {}) const {
    return text_drawing(table_, contents_, "", options);
  }
  // From the line that holds `begin` on.
  std::string text_from(const std::string& begin, const DrawingOptions& options = {}) const {
    const std::string all = text(options);
    const size_t at = all.find(begin);
    return at == std::string::npos ? "no " + begin + " in\n" + all : all.substr(at);
  }
  std::string svg(const DrawingOptions& options = {}) const {
    return svg_drawing(table_, contents_, "", options);
  }

 private:
  std::vector<std::byte> bytes_;
  BatchTable table_;
  BatchContents contents_;
};

size_t count(const std::string& text, const std::string& part) {
  size_t number = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++number;
  return number;
}

TEST(TextDrawing, SummaryTellsTokensAndPadsAvoided) {
  const std::string text = Drawn(batch_bytes(packed_columns())).text();
  EXPECT_NE(text.find("packed: 3 samples of 2 groups in 2 rows\n"
                      "tokens: 12 = 7 prompt + 5 response; 5 in the loss\n"
                      "pads: none; 9 avoided of 21 cells, laid out as [3, 4 + 3] (42.9%)\n"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("  cu_seqlens          <i4    -          [4]\n"), std::string::npos) << text;
}

TEST(TextDrawing, PackedRowsShowSamplesMasksAndAttention) {
  EXPECT_EQ(Drawn(batch_bytes(packed_columns())).text_from("rows;"),
            "rows; a cell is 1 token: . prompt, # in the loss, o response outside it, - pad\n"
            "row 0     8 tokens, 2 samples, 0 to 1\n"
            "  sample  00000111\n"
            "  mask    ..###.##\n"
            "row 1     4 tokens, sample 2\n"
            "  sample  2222\n"
            "  mask    ....\n"
            "\n"
            "attention of row 0: a query a line, a key a column, 1 token a cell:\n"
            "# seen, + in part, . unseen, - pads\n"
            "  #.......\n"
            "  ##......\n"
            "  ###.....\n"
            "  ####....\n"
            "  #####...\n"
            "  .....#..\n"
            "  .....##.\n"
            "  .....###\n");
}

TEST(TextDrawing, PaddedRowsShowTheirPads) {
  EXPECT_EQ(Drawn(batch_bytes(padded_columns())).text_from("rows;", {.limit = 2}),
            "rows; a cell is 1 token: . prompt, # in the loss, o response outside it, - pad\n"
            "row 0     5 tokens, sample 0\n"
            "  sample    00000\n"
            "  mask    --..###\n"
            "row 1     3 tokens, sample 1\n"
            "  sample     111 \n"
            "  mask    ---.##-\n"
            "  .. 1 rows not shown; see --limit and --row\n"
            "\n"
            "attention of row 0: a query a line, a key a column, 1 token a cell:\n"
            "# seen, + in part, . unseen, - pads\n"
            "  -------\n"
            "  -------\n"
            "  --#....\n"
            "  --##...\n"
            "  --###..\n"
            "  --####.\n"
            "  --#####\n");
}

TEST(TextDrawing, AChosenRowListsItsSamples) {
  const std::string text =
      Drawn(batch_bytes(packed_columns())).text_from("samples of row", {.rows = {1}});
  EXPECT_EQ(text.substr(0, text.find("\nattention")),
            "samples of row 1\n"
            "  sample index  prompt response finish  versions   logprob  prompt_id\n"
            "       2     0       4        0 abort          -         -  b<\n");
  const std::string other = Drawn(batch_bytes(packed_columns())).text({.rows = {0}});
  EXPECT_NE(other.find("       0     0       2        3 stop        4..5   -2.0000  a\n"
                       "       1     1       1        2 length         4   -1.5000  a\n"),
            std::string::npos)
      << other;
  EXPECT_EQ(error_text([] { Drawn(batch_bytes(packed_columns())).text({.rows = {2}}); }),
            "invalid_argument: --row = 2: expected 0 to 1");
}

TEST(TextDrawing, ResponseTokensOutsideTheLossAreMarked) {
  std::vector<HandColumn> columns = packed_columns();
  put(column_of(columns, "loss_mask").bytes, 3, uint8_t{0});
  EXPECT_NE(Drawn(batch_bytes(columns)).text().find("  mask    ..#o#.##\n"), std::string::npos);
}

TEST(TextDrawing, LinesFitWhateverTheBatch) {
  for (const char* layout : {"packed", "padded"}) {
    const std::vector<Sample> samples = example_samples(200, 5, false);
    const LayoutOptions options{.layout = layout, .max_tokens_per_row = 500, .pad_token_id = 2};
    const Drawn drawn(write_batch(*make_layout(options), pointers_to(samples)).bytes);
    for (const int64_t width : {80, 120}) {
      std::istringstream lines(drawn.text({.rows = {0, 1}, .width = width}));
      for (std::string line; std::getline(lines, line);) {
        EXPECT_LE(line.size(), static_cast<size_t>(width)) << line;
      }
    }
  }
}

TEST(TextDrawing, ABatchWithoutSamplesIsDrawn) {
  const WrittenBatch written = write_batch(*make_layout({}), {});
  const std::string text = Drawn(written.bytes).text();
  EXPECT_NE(text.find("packed: 0 samples of 0 groups in 0 rows\n"), std::string::npos) << text;
  EXPECT_EQ(count(Drawn(written.bytes).svg(), "class=\"row\""), 0u);
}

TEST(SvgDrawing, ElementsCountWhatTheColumnsSay) {
  const std::string packed = Drawn(batch_bytes(packed_columns())).svg();
  EXPECT_EQ(count(packed, "class=\"row\""), 2u);
  EXPECT_EQ(count(packed, "class=\"prompt\""), 3u);
  EXPECT_EQ(count(packed, "class=\"response\""), 2u);
  EXPECT_EQ(count(packed, "class=\"loss\""), 2u);
  EXPECT_EQ(count(packed, "class=\"attention\""), 3u);
  EXPECT_EQ(count(packed, "class=\"pad\""), 0u);
  EXPECT_NE(packed.find("prompt b&lt;, sample_index 0"), std::string::npos);
  const std::string padded = Drawn(batch_bytes(padded_columns())).svg();
  EXPECT_EQ(count(padded, "class=\"row\""), 3u);
  EXPECT_EQ(count(padded, "class=\"loss\""), 2u);
  EXPECT_EQ(count(padded, "class=\"pad\""), 4u);  // left, left and right, right
  EXPECT_EQ(count(Drawn(batch_bytes(padded_columns())).svg({.rows = {2}}), "class=\"row\""), 1u);
}

TEST(Labels, TextFromOutsideCannotSteerATerminalOrBreakXml) {
  EXPECT_EQ(printable("a\x1b[2Jb\n", 80), "a?[2Jb?");
  EXPECT_EQ(printable("\xc2\x9b"
                      "31m\xc3\xa9",
                      80),
            "?31m\xc3\xa9");  // C1 control, then e acute
  EXPECT_EQ(printable("\xef\xbf\xbf", 80), "?");
  EXPECT_EQ(printable("x\xff", 80), "x?");
  EXPECT_EQ(printable("", 80), "");
}

TEST(VisiblePairs, AgreeWithCountingOneByOne) {
  constexpr int64_t kTokens = 9;
  for (int64_t begin = 0; begin <= kTokens; ++begin) {
    for (int64_t end = begin; end <= kTokens; ++end) {
      for (int64_t q = 0; q < kTokens; q += 2) {
        for (int64_t k = 0; k < kTokens; k += 3) {
          int64_t expected = 0;
          for (int64_t query = q; query < q + 2; ++query) {
            for (int64_t key = k; key < k + 3; ++key) {
              expected += query >= begin && query < end && key >= begin && key <= query;
            }
          }
          ASSERT_EQ(visible_pairs(begin, end, q, q + 2, k, k + 3), expected);
        }
      }
    }
  }
}

}  // namespace
}  // namespace rollpack::bridge
