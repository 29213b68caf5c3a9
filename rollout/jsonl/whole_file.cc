#include "rollout/jsonl/whole_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

constexpr size_t kBufferBytes = size_t{1} << 18;

std::string resolve_links(const std::string& path) {
  const std::unique_ptr<char, decltype(&std::free)> real(::realpath(path.c_str(), nullptr),
                                                         &std::free);
  return real == nullptr ? path : std::string(real.get());
}

// Beside the target, because rename() works within one file system only. O_EXCL with 0666 and not
// mkstemp, whose 0600 would ignore the user's umask.
FileDescriptor create_beside(const std::string& target, std::string& temporary_path) {
  for (int attempt = 0;; ++attempt) {
    temporary_path = fmt::format("{}.tmp{}.{}", target, ::getpid(), attempt);
    FileDescriptor fd(
        ::open(temporary_path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
    if (fd.is_open() || errno != EEXIST || attempt == 100) return fd;
  }
}

}  // namespace

WholeFile::WholeFile(const std::string& path) : path_(path), target_(resolve_links(path)) {
  struct stat status = {};
  const bool exists = ::stat(path.c_str(), &status) == 0;
  if (path == "-" || path == "/dev/stdout") {
    fd_ = FileDescriptor(::fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 0));
  } else if (exists && S_ISDIR(status.st_mode)) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "--output",
                 .value = path,
                 .allowed = "a file",
                 .message = "this is a folder"});
  } else if (exists && !S_ISREG(status.st_mode)) {
    fd_ = FileDescriptor(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  } else {
    fd_ = create_beside(target_, temporary_path_);
    const int error = errno;
    if (!fd_.is_open()) temporary_path_.clear();
    errno = error;
  }
  if (!fd_.is_open()) fail("opening", errno);
}

WholeFile::~WholeFile() {
  if (!temporary_path_.empty()) ::unlink(temporary_path_.c_str());
}

void WholeFile::write(std::string_view bytes) {
  buffer_ += bytes;
  if (buffer_.size() >= kBufferBytes) flush();
}

void WholeFile::flush() {
  for (size_t done = 0; done < buffer_.size();) {
    const ssize_t put = ::write(fd_.get(), buffer_.data() + done, buffer_.size() - done);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail("writing", errno);
    done += static_cast<size_t>(put);
  }
  buffer_.clear();
}

void WholeFile::commit() {
  flush();
  if (temporary_path_.empty()) return;
  if (::fsync(fd_.get()) != 0) fail("syncing", errno);
  if (::rename(temporary_path_.c_str(), target_.c_str()) != 0) fail("renaming", errno);
  temporary_path_.clear();
  // The rename itself is durable once its folder is synced.
  const size_t slash = target_.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : target_.substr(0, slash + 1);
  const FileDescriptor directory(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (directory.is_open()) ::fsync(directory.get());
}

void WholeFile::fail(std::string_view action, int error) const {
  const bool is_full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  throw Error({.code = error == ENOENT ? ErrorCode::kNotFound
                       : is_full       ? ErrorCode::kResourceExhausted
                                       : ErrorCode::kUnavailable,
               .field = "--output",
               .value = path_,
               .message = fmt::format("{} it failed: {}", action, std::strerror(error))});
}

}  // namespace rollpack::rollout
