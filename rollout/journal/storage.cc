#include "rollout/journal/storage.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include <fmt/format.h>

#include "kernels/base/error.h"

namespace rollpack::rollout {
namespace {

namespace fs = std::filesystem;

bool is_named(int fd, const std::string& path) {
  struct stat open_file = {}, named_file = {};
  return ::fstat(fd, &open_file) == 0 && ::stat(path.c_str(), &named_file) == 0 &&
         open_file.st_dev == named_file.st_dev && open_file.st_ino == named_file.st_ino;
}

std::string folder_of(const std::string& path) {
  const std::string folder = fs::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

}  // namespace

JournalFile::JournalFile(std::string path) : path_(std::move(path)) {
  std::error_code ignored;
  const std::string folder = folder_of(path_);
  if (!fs::is_directory(folder, ignored)) {
    fs::create_directories(fs::path(folder).parent_path(), ignored);
    ::mkdir(folder.c_str(), 0700);  // open() says what came of it
  }
  for (;;) {
    fd_.reset(::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!fd_) fail("open", errno);
    struct stat status = {};
    if (::fstat(fd_.get(), &status) != 0) fail("fstat", errno);
    if (!S_ISREG(status.st_mode)) {
      throw Error({.code = ErrorCode::kInvalidArgument,
                   .field = "cluster.journal",
                   .value = path_,
                   .allowed = "a file, or a name that is free"});
    }
    if (::flock(fd_.get(), LOCK_EX | LOCK_NB) != 0) {
      if (errno != EWOULDBLOCK) fail("flock", errno);
      throw Error({.code = ErrorCode::kFailedPrecondition,
                   .field = "cluster.journal",
                   .value = path_,
                   .allowed = "a journal that no other job writes",
                   .message = "another process has locked it: end that job or name another file"});
    }
    // Another job may have put a new file in its place before this one had the lock.
    if (is_named(fd_.get(), path_)) return;
  }
}

void JournalFile::fail(const char* call, int error) const {
  const bool is_full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  const bool is_wrong =
      error == EISDIR || error == ENOTDIR || error == ELOOP || error == ENAMETOOLONG;
  throw Error({.code = is_full    ? ErrorCode::kResourceExhausted
                       : is_wrong ? ErrorCode::kInvalidArgument
                                  : ErrorCode::kUnavailable,
               .field = "cluster.journal",
               .value = path_,
               .allowed = is_full ? "room on its disk" : "a file that can be written",
               .message = fmt::format("{}: {}", call, std::strerror(error))});
}

std::string JournalFile::read() {
  std::string bytes;
  struct stat status = {};
  if (::fstat(fd_.get(), &status) != 0) fail("fstat", errno);
  bytes.resize(static_cast<size_t>(status.st_size));
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got =
        ::pread(fd_.get(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail("read", errno);
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  bytes.resize(done);
  if (::lseek(fd_.get(), 0, SEEK_END) < 0) fail("lseek", errno);
  return bytes;
}

void JournalFile::write_all(int fd, std::string_view bytes) const {
  while (!bytes.empty()) {
    const ssize_t put = ::write(fd, bytes.data(), bytes.size());
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail("write", errno);
    bytes.remove_prefix(static_cast<size_t>(put));
  }
}

void JournalFile::append(std::string_view bytes) {
  write_all(fd_.get(), bytes);
}

void JournalFile::sync() {
  if (::fdatasync(fd_.get()) != 0) fail("fdatasync", errno);
}

// The new file is locked before it has the name, so that no other job finds it unlocked.
void JournalFile::replace(std::string_view bytes) {
  const std::string beside = path_ + ".new";
  bridge::OwnedFd fd(
      ::open(beside.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) fail("open", errno);
  if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) fail("flock", errno);
  try {
    write_all(fd.get(), bytes);
    if (::fsync(fd.get()) != 0) fail("fsync", errno);
    if (::rename(beside.c_str(), path_.c_str()) != 0) fail("rename", errno);
  } catch (...) {
    ::unlink(beside.c_str());
    throw;
  }
  // The rename itself is on disk once its folder is.
  const bridge::OwnedFd folder(
      ::open(folder_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder || ::fsync(folder.get()) != 0) fail("fsync of its folder", errno);
  fd_ = std::move(fd);
}

}  // namespace rollpack::rollout
