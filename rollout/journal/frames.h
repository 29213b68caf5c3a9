// Records one behind the other, each with its length, checksum and number, so that a reader knows
// where the valid ones end: a crash tears the last one, a disk may change any.
//
//   u32 length of the record | u32 crc32 of all that follows | u64 number, from 0 | the record
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace rollpack::rollout {

inline constexpr size_t kFrameHeadBytes = 16;
// Of 65,536 prompts from a frame of 16 MiB, each with 1,024 stop tokens of the configuration, a
// record takes 300 MB.
inline constexpr size_t kMaxRecordBytes = size_t{1} << 30;

// Appends the frame of a record.
// Errors: resource_exhausted for a record above kMaxRecordBytes.
void append_frame(std::string& bytes, std::string_view record, uint64_t number);

struct Frames {
  std::vector<std::string_view> records;  // views of the bytes
  size_t num_valid_bytes = 0;             // where the last one ends
};

// The longest run of valid frames from the beginning: each whole, under its number, with its
// checksum. What follows is not looked at.
Frames read_frames(std::string_view bytes);

}  // namespace rollpack::rollout
