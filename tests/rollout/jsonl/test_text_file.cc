#include "rollout/jsonl/text_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <string>
#include <thread>
#include <vector>

#include "tests/error_text.h"
#include "tests/rollout/temporary_folder.h"

namespace rollpack::rollout {
namespace {

using testing::error_text;
using testing::TemporaryFolder;

std::vector<std::string> lines_of(const std::string& path, size_t max_line_bytes = 1 << 20) {
  LineReader reader(path, "--prompts", max_line_bytes);
  std::vector<std::string> lines;
  while (const auto line = reader.next()) lines.emplace_back(*line);
  EXPECT_EQ(reader.line_number(), static_cast<int64_t>(lines.size()));
  return lines;
}

TEST(LineReader, SplitsAtNewlinesAndKeepsALastLineWithoutOne) {
  const TemporaryFolder folder;
  using Lines = std::vector<std::string>;
  EXPECT_EQ(lines_of(folder.write("a", "")), Lines{});
  EXPECT_EQ(lines_of(folder.write("a", "x")), Lines{"x"});
  EXPECT_EQ(lines_of(folder.write("a", "x\n")), Lines{"x"});
  EXPECT_EQ(lines_of(folder.write("a", "\n\nx\ny")), (Lines{"", "", "x", "y"}));
}

// Reads come in blocks of 1 MiB: lines that end at, before and behind a block's end.
TEST(LineReader, LinesMayCrossBlocks) {
  const TemporaryFolder folder;
  const size_t block = size_t{1} << 20;
  for (const size_t length : {block - 2, block - 1, block, block + 1, 3 * block + 7}) {
    const std::vector<std::string> want = {std::string(length, 'a'), "b", std::string(length, 'c')};
    const std::string path = folder.write("a", want[0] + "\n" + want[1] + "\n" + want[2]);
    EXPECT_EQ(lines_of(path, 4 * block), want) << length;
  }
}

TEST(LineReader, AFileWithoutNewlinesIsAnErrorNotAnAllocation) {
  const TemporaryFolder folder;
  const std::string path = folder.write("a", "x\n" + std::string(size_t{5} << 20, 'y'));
  EXPECT_EQ(
      error_text([&] { lines_of(path, size_t{2} << 20); }),
      "invalid_argument: --prompts (" + path + ":2): expected lines of at most 2097152 bytes");
}

TEST(LineReader, ReadsFromAPipe) {
  const TemporaryFolder folder;
  const std::string path = folder.file("fifo");
  ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
  std::thread writer([&] { folder.write("fifo", "a\nb\n"); });
  EXPECT_EQ(lines_of(path), (std::vector<std::string>{"a", "b"}));
  writer.join();
}

TEST(LineReader, AFolderAndAMissingFileAreNamed) {
  EXPECT_EQ(error_text([] { lines_of("/"); }),
            "invalid_argument: --prompts = /: expected a file of JSON lines; this is a folder");
  EXPECT_EQ(error_text([] { lines_of("/nonexistent"); }),
            "not_found: --prompts = /nonexistent: cannot be opened: No such file or directory");
}

TEST(TextFile, AFifoIsRefusedWithoutWaitingForAWriter) {
  const TemporaryFolder folder;
  const std::string path = folder.file("fifo");
  ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
  EXPECT_EQ(error_text([&] { read_text_file(path, "file", 10); }),
            "invalid_argument: file = " + path + ": expected a regular file; this is a FIFO");
}

TEST(TextFile, FirstInvalidUtf8ByteIsFound) {
  EXPECT_EQ(find_invalid_utf8("plain \xC3\xA9 \xE2\x82\xAC \xF0\x9F\x98\x80"), std::nullopt);
  const std::vector<std::pair<std::string, size_t>> cases = {
      {"a\x80", 1},             // continuation without a lead
      {"\xC0\xAF", 0},          // overlong
      {"ab\xE0\x80\x80", 2},    // overlong
      {"\xED\xA0\x80", 0},      // surrogate
      {"\xF4\x90\x80\x80", 0},  // above U+10FFFF
      {"\xF0\x9F\x98", 0},      // cut short
      {"\xE2\x82x", 0},         // third byte is none
      {"\xFF", 0},
  };
  for (const auto& [text, at] : cases) EXPECT_EQ(find_invalid_utf8(text), at);
}

}  // namespace
}  // namespace rollpack::rollout
