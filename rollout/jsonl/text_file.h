// Reading files that others wrote: whole small ones, and long ones line by line. Both know sizes
// before they trust them, and neither waits for ever on a pipe that was meant to be a file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "rollout/jsonl/file_descriptor.h"

namespace rollpack::rollout {

struct RegularFile {
  FileDescriptor fd;
  int64_t bytes = 0;
};

// Opens `path` for reading; a symbolic link is followed. `field` names the file in errors.
// Errors: not_found; invalid_argument for a folder, FIFO, socket or device; unavailable where the
// system refuses (permissions, too many open files).
RegularFile open_regular_file(const std::string& path, std::string_view field);

// Reads at most buffer.size() bytes at `offset`, short only at the end of the file.
// Errors: data_loss with the system's reason and `path`.
size_t read_at(const FileDescriptor& fd, void* buffer, size_t bytes, int64_t offset,
               const std::string& path);

// The whole of a regular file.
// Errors: those of open_regular_file; invalid_argument above `max_bytes`.
std::string read_text_file(const std::string& path, std::string_view field, int64_t max_bytes);

// Offset of the first byte that is not part of valid UTF-8 (overlong forms, surrogates and code
// points above U+10FFFF are not valid), or nothing.
std::optional<size_t> find_invalid_utf8(std::string_view text);

// Lines of a file, pipe or standard input ("-"), without their newline.
class LineReader {
 public:
  // `max_line_bytes` bounds memory: a file without newlines is an error, not an allocation.
  LineReader(const std::string& path, std::string_view field,
             size_t max_line_bytes = size_t{64} << 20);

  // The next line, or nothing at the end. The view is valid until the next call.
  std::optional<std::string_view> next();
  // Of the last line returned, from 1.
  int64_t line_number() const { return line_number_; }
  // "path:line" of the last line returned.
  std::string origin() const;

 private:
  bool fill();

  std::string path_;
  std::string field_;
  size_t max_line_bytes_;
  FileDescriptor fd_;
  std::string buffer_;
  size_t begin_ = 0;  // of what next() has not returned yet
  bool at_end_ = false;
  int64_t line_number_ = 0;
};

}  // namespace rollpack::rollout
