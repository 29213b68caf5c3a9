#include "rollout/journal/frames.h"

#include <cstring>
#include <span>

#include <fmt/format.h>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

template <class T>
T number_at(std::string_view bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(value));
  return value;
}

uint32_t checksum(std::string_view frame) {
  return crc32_of(std::as_bytes(std::span(frame.substr(8))));
}

}  // namespace

void append_frame(std::string& bytes, std::string_view record, uint64_t number) {
  if (record.size() > kMaxRecordBytes) {
    throw Error({.code = ErrorCode::kResourceExhausted,
                 .field = "cluster.journal",
                 .value = fmt::format("a record of {} bytes", record.size()),
                 .allowed = fmt::format("at most {}", kMaxRecordBytes),
                 .message = "submit fewer prompts at once"});
  }
  const size_t start = bytes.size();
  const auto length = static_cast<uint32_t>(record.size());
  bytes.append(reinterpret_cast<const char*>(&length), sizeof(length));
  bytes.append(sizeof(uint32_t), '\0');
  bytes.append(reinterpret_cast<const char*>(&number), sizeof(number));
  bytes += record;
  const uint32_t crc = checksum(std::string_view(bytes).substr(start));
  std::memcpy(bytes.data() + start + 4, &crc, sizeof(crc));
}

// The length is not under the checksum and need not be: a wrong one has the checksum of other
// bytes looked at.
Frames read_frames(std::string_view bytes) {
  Frames frames;
  for (;;) {
    const std::string_view rest = bytes.substr(frames.num_valid_bytes);
    if (rest.size() < kFrameHeadBytes) return frames;
    const auto length = number_at<uint32_t>(rest, 0);
    if (length > kMaxRecordBytes || length > rest.size() - kFrameHeadBytes) return frames;
    const std::string_view frame = rest.substr(0, kFrameHeadBytes + length);
    if (number_at<uint64_t>(frame, 8) != frames.records.size()) return frames;
    if (number_at<uint32_t>(frame, 4) != checksum(frame)) return frames;
    frames.records.push_back(frame.substr(kFrameHeadBytes));
    frames.num_valid_bytes += frame.size();
  }
}

}  // namespace rollpack::rollout
