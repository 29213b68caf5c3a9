#include "trainer_bridge/server/listen_socket.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::bridge {
namespace {

constexpr int kBacklog = 64;

ErrorInfo path_error(ErrorCode code, const std::string& path, std::string allowed,
                     std::string message) {
  return {.code = code,
          .field = "bridge.socket",
          .value = path,
          .allowed = std::move(allowed),
          .message = std::move(message)};
}

// The umask belongs to the process; it is narrowed only around bind(), where the file appears.
class NarrowUmask {
 public:
  NarrowUmask() : before_(::umask(0177)) {}
  ~NarrowUmask() { ::umask(before_); }

 private:
  mode_t before_;
};

bool is_same_file(int fd, const std::string& path) {
  struct stat open_file = {}, named_file = {};
  return ::fstat(fd, &open_file) == 0 && ::stat(path.c_str(), &named_file) == 0 &&
         open_file.st_dev == named_file.st_dev && open_file.st_ino == named_file.st_ino;
}

std::string lock_holder(int fd) {
  char text[32] = {};
  const ssize_t got = ::pread(fd, text, sizeof text - 1, 0);
  return got > 0 ? fmt::format("process {}", text) : "another process";
}

}  // namespace

ListenSocket::ListenSocket(std::string path) : path_(std::move(path)) {
  if (path_.empty() || path_.size() > kMaxSocketPathBytes || path_.find('\0') != path_.npos) {
    throw Error(
        path_error(ErrorCode::kInvalidArgument, path_,
                   fmt::format("1 to {} bytes, as a socket's address holds", kMaxSocketPathBytes),
                   "a path relative to the working directory is shorter"));
  }
  create_directory();
  take_lock();
}

ListenSocket::~ListenSocket() {
  if (socket_) ::unlink(path_.c_str());
  ::unlink((path_ + ".lock").c_str());
}

void ListenSocket::fail_system(const char* call) const {
  throw Error(path_error(ErrorCode::kInvalidArgument, path_, "a place where a socket can be made",
                         fmt::format("{}: {}", call, std::strerror(errno))));
}

void ListenSocket::create_directory() const {
  const std::filesystem::path directory = std::filesystem::path(path_).parent_path();
  if (directory.empty()) return;
  std::error_code error;
  if (std::filesystem::is_directory(directory, error)) return;
  if (directory.has_parent_path()) {
    std::filesystem::create_directories(directory.parent_path(), error);
  }
  if (::mkdir(directory.c_str(), 0700) != 0 && errno != EEXIST) fail_system("mkdir");
}

void ListenSocket::take_lock() {
  const std::string lock_path = path_ + ".lock";
  for (;;) {
    OwnedFd lock(::open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!lock) fail_system("open of the lock file");
    if (::flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
      if (errno != EWOULDBLOCK) fail_system("flock");
      throw Error(path_error(ErrorCode::kFailedPrecondition, path_,
                             "a path that no live server has",
                             fmt::format("{} has it", lock_holder(lock.get()))));
    }
    // Between open and flock its holder may have ended and removed it: then this is a dead name.
    if (!is_same_file(lock.get(), lock_path)) continue;
    if (::ftruncate(lock.get(), 0) != 0) fail_system("ftruncate of the lock file");
    const std::string pid = std::to_string(::getpid());
    if (::pwrite(lock.get(), pid.data(), pid.size(), 0) < 0) fail_system("write of the lock file");
    lock_ = std::move(lock);
    return;
  }
}

void ListenSocket::listen() {
  struct stat status = {};
  if (::lstat(path_.c_str(), &status) == 0) {
    if (!S_ISSOCK(status.st_mode)) {
      throw Error(path_error(ErrorCode::kInvalidArgument, path_, "no file of another kind", ""));
    }
    ::unlink(path_.c_str());
  }
  OwnedFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) fail_system("socket");
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path_.data(), path_.size());
  {
    const NarrowUmask narrow;
    if (::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
      fail_system("bind");
    }
  }
  socket_ = std::move(socket);
  if (::listen(socket_.get(), kBacklog) != 0) fail_system("listen");
}

}  // namespace rollpack::bridge
