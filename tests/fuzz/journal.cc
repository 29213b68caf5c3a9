// A journal: the input is a list of records, each behind a u16 length, put into frames that are
// right, so that what records mean is reached; as it is, it is a journal too. What lives at the end
// makes the same set again.
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "rollout/journal/frames.h"
#include "rollout/journal/live_set.h"
#include "rollout/journal/record.h"
#include "tests/fuzz/fuzz_input.h"

namespace {

using namespace rollpack::fuzz;
using namespace rollpack::rollout;

// Those before the first that is cut.
std::string framed(std::string_view input) {
  std::string bytes;
  for (uint64_t number = 0; input.size() >= 2; ++number) {
    const size_t length = static_cast<uint8_t>(input[0]) | static_cast<uint8_t>(input[1]) << 8;
    input.remove_prefix(2);
    if (length > input.size()) break;
    append_frame(bytes, input.substr(0, length), number);
    input.remove_prefix(length);
  }
  return bytes;
}

// As a start does: up to the first record that is none, or contradicts those before it.
LiveSet read_journal(std::string_view bytes) {
  const Frames frames = read_frames(bytes);
  require(frames.num_valid_bytes <= bytes.size(), "frames beyond the end");
  LiveSet live;
  for (const std::string_view bytes_of_record : frames.records) {
    const bool is_read = reads_or_refuses([&] {
      Record record = decode_record(bytes_of_record);
      require(encode(record) == bytes_of_record, "a record that changes");
      live.apply(std::move(record));
    });
    if (!is_read) break;
  }
  return live;
}

std::string rewritten(const LiveSet& live) {
  std::string bytes;
  uint64_t number = 0;
  for (const Record& record : live.records()) append_frame(bytes, encode(record), number++);
  return bytes;
}

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  read_journal(text_of(data, size));
  const std::string bytes = framed(text_of(data, size));
  require(read_frames(bytes).num_valid_bytes == bytes.size(), "a frame that is not read");
  const LiveSet live = read_journal(bytes);
  live.requests();
  live.delivery();
  const std::string once = rewritten(live);
  require(rewritten(read_journal(once)) == once, "a set that changes when it is rewritten");
  return 0;
}
