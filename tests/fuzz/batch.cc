// A batch that somebody else wrote. Size and checksum of its header are made to fit, so that what
// lies behind them is reached; what was read can be drawn.
#include <cstddef>
#include <cstring>
#include <vector>

#include "kernels/base/checksum.h"
#include "tests/fuzz/fuzz_input.h"
#include "trainer_bridge/inspection/batch_contents.h"
#include "trainer_bridge/inspection/batch_table.h"
#include "trainer_bridge/inspection/svg_drawing.h"
#include "trainer_bridge/inspection/text_drawing.h"

namespace {

using namespace rollpack::bridge;
using namespace rollpack::fuzz;

void stamp(std::vector<std::byte>& bytes) {
  if (bytes.size() < sizeof(BatchHeader)) return;
  const uint64_t num_bytes = bytes.size();
  const uint32_t crc32 = rollpack::crc32_of(std::span(bytes).subspan(sizeof(BatchHeader)));
  std::memcpy(bytes.data() + offsetof(BatchHeader, bytes), &num_bytes, sizeof num_bytes);
  std::memcpy(bytes.data() + offsetof(BatchHeader, crc32), &crc32, sizeof crc32);
}

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<std::byte> bytes(size);
  if (size > 0) std::memcpy(bytes.data(), data, size);
  reads_or_refuses([&] { read_batch_table(bytes, "F"); });
  stamp(bytes);
  reads_or_refuses([&] {
    const BatchTable table = read_batch_table(bytes, "F");
    const BatchContents contents = read_batch_contents(table);
    const DrawingOptions first{.rows = {}, .limit = 3, .width = 60};
    const DrawingOptions one{.rows = {0}};
    text_drawing(table, contents, "", first);
    svg_drawing(table, contents, "", first);
    if (!contents.rows.empty()) text_drawing(table, contents, "", one);
  });
  return 0;
}
