#include "rollout/jsonl/text_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

constexpr size_t kReadBytes = size_t{1} << 20;

[[noreturn]] void fail_open(std::string_view field, const std::string& path, int error) {
  const bool is_absent = error == ENOENT || error == ENOTDIR;
  throw Error({.code = is_absent ? ErrorCode::kNotFound : ErrorCode::kUnavailable,
               .field = std::string(field),
               .value = path,
               .message = fmt::format("cannot be opened: {}", std::strerror(error))});
}

const char* file_kind(mode_t mode) {
  if (S_ISDIR(mode)) return "a folder";
  if (S_ISFIFO(mode)) return "a FIFO";
  if (S_ISSOCK(mode)) return "a socket";
  return "a device";
}

}  // namespace

RegularFile open_regular_file(const std::string& path, std::string_view field) {
  // O_NONBLOCK: opening a FIFO without a writer would wait for ever; it changes nothing for files.
  FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd.is_open()) fail_open(field, path, errno);
  struct stat status = {};
  if (::fstat(fd.get(), &status) != 0) fail_open(field, path, errno);
  if (!S_ISREG(status.st_mode)) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = std::string(field),
                 .value = path,
                 .allowed = "a regular file",
                 .message = fmt::format("this is {}", file_kind(status.st_mode))});
  }
  return {.fd = std::move(fd), .bytes = status.st_size};
}

size_t read_at(const FileDescriptor& fd, void* buffer, size_t bytes, int64_t offset,
               const std::string& path) {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t got = ::pread(fd.get(), static_cast<char*>(buffer) + done, bytes - done,
                                offset + static_cast<int64_t>(done));
    if (got == 0) break;
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      throw Error({.code = ErrorCode::kDataLoss,
                   .origin = path,
                   .message = fmt::format("reading {} bytes at offset {} failed: {}", bytes, offset,
                                          std::strerror(errno))});
    }
    done += static_cast<size_t>(got);
  }
  return done;
}

std::string read_text_file(const std::string& path, std::string_view field, int64_t max_bytes) {
  const RegularFile file = open_regular_file(path, field);
  if (file.bytes > max_bytes) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = std::string(field),
                 .value = path,
                 .allowed = fmt::format("a file of at most {} bytes", max_bytes),
                 .message = fmt::format("this one has {}", file.bytes)});
  }
  std::string text(static_cast<size_t>(file.bytes), '\0');
  text.resize(read_at(file.fd, text.data(), text.size(), 0, path));
  return text;
}

std::optional<size_t> find_invalid_utf8(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  for (size_t i = 0; i < text.size();) {
    const uint8_t lead = byte(i);
    if (lead < 0x80) {
      ++i;
      continue;
    }
    const size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    if (lead < 0xC2 || lead > 0xF4 || i + length > text.size()) return i;
    // The second byte's range is narrower after four leads: no overlong forms, no surrogates,
    // nothing above U+10FFFF (Unicode 15, table 3-7).
    const uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (byte(i + 1) < low || byte(i + 1) > high) return i;
    for (size_t k = 2; k < length; ++k) {
      if ((byte(i + k) & 0xC0) != 0x80) return i;
    }
    i += length;
  }
  return std::nullopt;
}

LineReader::LineReader(const std::string& path, std::string_view field, size_t max_line_bytes)
    : path_(path), field_(field), max_line_bytes_(max_line_bytes) {
  fd_ = FileDescriptor(path == "-" ? ::fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 0)
                                   : ::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd_.is_open()) fail_open(field, path, errno);
  struct stat status = {};
  if (::fstat(fd_.get(), &status) == 0 && S_ISDIR(status.st_mode)) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = field_,
                 .value = path,
                 .allowed = "a file of JSON lines",
                 .message = "this is a folder"});
  }
}

bool LineReader::fill() {
  buffer_.erase(0, begin_);
  begin_ = 0;
  const size_t kept = buffer_.size();
  if (kept > max_line_bytes_) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = field_,
                 .origin = fmt::format("{}:{}", path_, line_number_ + 1),
                 .allowed = fmt::format("lines of at most {} bytes", max_line_bytes_)});
  }
  buffer_.resize(kept + kReadBytes);
  ssize_t got = 0;
  do {
    got = ::read(fd_.get(), buffer_.data() + kept, kReadBytes);
  } while (got < 0 && errno == EINTR);
  if (got < 0) {
    throw Error({.code = ErrorCode::kDataLoss,
                 .field = field_,
                 .value = path_,
                 .message = fmt::format("reading failed: {}", std::strerror(errno))});
  }
  buffer_.resize(kept + static_cast<size_t>(got));
  at_end_ = got == 0;
  return !at_end_;
}

std::optional<std::string_view> LineReader::next() {
  size_t searched = begin_;
  for (;;) {
    const size_t newline = buffer_.find('\n', searched);
    if (newline != std::string::npos) {
      const std::string_view line(buffer_.data() + begin_, newline - begin_);
      begin_ = newline + 1;
      ++line_number_;
      return line;
    }
    const size_t pending = buffer_.size() - begin_;
    if (!at_end_ && fill()) {
      searched = pending;  // fill() moved what was pending to the front
      continue;
    }
    if (buffer_.size() == begin_) return std::nullopt;
    const std::string_view line(buffer_.data() + begin_, buffer_.size() - begin_);
    begin_ = buffer_.size();
    ++line_number_;
    return line;
  }
}

std::string LineReader::origin() const {
  return fmt::format("{}:{}", path_, line_number_);
}

}  // namespace rollpack::rollout
