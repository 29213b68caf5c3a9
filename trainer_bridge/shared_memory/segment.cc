#include "trainer_bridge/shared_memory/segment.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::bridge {
namespace {

// Linux 6.3; the C library of Debian 12 does not name it yet.
constexpr unsigned kMfdNoexecSeal = 0x0008u;
constexpr int kPopulateWrite = 23;  // Linux 5.14's MADV_POPULATE_WRITE, likewise

void check_bytes(const std::string& field, int64_t bytes) {
  if (bytes >= 1) return;
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = field,
               .value = fmt::format("{} bytes", bytes),
               .allowed = "1 or more"});
}

[[noreturn]] void fail_create(ErrorCode code, const std::string& name, int64_t bytes,
                              std::string_view call, int error_number) {
  throw Error({.code = code,
               .field = "memfd " + name,
               .value = fmt::format("{} bytes", bytes),
               .message = fmt::format("{}: {}", call, std::strerror(error_number))});
}

int create_memfd(const std::string& name) {
  const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  const int fd = ::memfd_create(name.c_str(), flags | kMfdNoexecSeal);
  if (fd >= 0 || errno != EINVAL) return fd;
  return ::memfd_create(name.c_str(), flags);  // an older kernel
}

// Asked before the file grows: growing past the limit raises SIGXFSZ, which ends the process.
void check_file_size_limit(const std::string& name, int64_t bytes) {
  rlimit limit{};
  if (::getrlimit(RLIMIT_FSIZE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY ||
      static_cast<rlim_t>(bytes) <= limit.rlim_cur) {
    return;
  }
  throw Error({.code = ErrorCode::kResourceExhausted,
               .field = "memfd " + name,
               .value = fmt::format("{} bytes", bytes),
               .allowed = fmt::format("{} bytes, the limit on file sizes", limit.rlim_cur),
               .message = "it holds for shared memory too; raise it with ulimit -f"});
}

// Asked before pages are taken: the kernel grants them one by one until its OOM killer chooses a
// process. Not asked where the system does not say.
void check_available_memory(const std::string& name, int64_t bytes) {
  std::ifstream meminfo("/proc/meminfo");
  std::string key;
  int64_t kibibytes = 0;
  std::string unit;
  while (meminfo >> key >> kibibytes && key != "MemAvailable:") std::getline(meminfo, unit);
  if (key != "MemAvailable:" || bytes <= kibibytes * 1024) return;
  throw Error({.code = ErrorCode::kResourceExhausted,
               .field = "memfd " + name,
               .value = fmt::format("{} bytes", bytes),
               .allowed = fmt::format("{} bytes, the memory available now", kibibytes * 1024)});
}

// Takes every page now: without, the first touch of a page that is not there is a SIGBUS.
void allocate_pages(int fd, const std::string& name, int64_t bytes) {
  if (::ftruncate(fd, bytes) != 0) {
    fail_create(ErrorCode::kResourceExhausted, name, bytes, "ftruncate", errno);
  }
  int result = EINTR;
  while (result == EINTR) result = ::posix_fallocate(fd, 0, bytes);
  if (result != 0) {
    fail_create(ErrorCode::kResourceExhausted, name, bytes, "posix_fallocate", result);
  }
}

std::string seal_names(int seals) {
  constexpr std::pair<int, std::string_view> kNames[] = {
      {F_SEAL_SEAL, "F_SEAL_SEAL"},
      {F_SEAL_SHRINK, "F_SEAL_SHRINK"},
      {F_SEAL_GROW, "F_SEAL_GROW"},
      {F_SEAL_WRITE, "F_SEAL_WRITE"},
      {F_SEAL_FUTURE_WRITE, "F_SEAL_FUTURE_WRITE"}};
  std::string text;
  for (const auto& [seal, name] : kNames) {
    if ((seals & seal) != 0) text += (text.empty() ? "" : " | ") + std::string(name);
  }
  return text.empty() ? "no seals" : text;
}

void check_seals(int fd, int required_seals, const std::string& origin) {
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (seals < 0) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "descriptor",
                 .value = std::to_string(fd),
                 .origin = origin,
                 .allowed = "a sealed memfd",
                 .message = fmt::format("F_GET_SEALS: {}", std::strerror(errno))});
  }
  if ((seals & required_seals) == required_seals) return;
  throw Error({.code = ErrorCode::kDataLoss,
               .field = "seals",
               .value = seal_names(seals),
               .origin = origin,
               .allowed = seal_names(required_seals),
               .message = "bytes that may still change or go are not read"});
}

// After the seals: only a size that can no longer shrink is worth comparing.
void check_size(int fd, int64_t bytes, const std::string& origin) {
  struct stat status {};
  if (::fstat(fd, &status) == 0 && status.st_size >= bytes) return;
  throw Error({.code = ErrorCode::kDataLoss,
               .field = "memfd size",
               .value = fmt::format("{} bytes", status.st_size),
               .origin = origin,
               .allowed = fmt::format("{} bytes or more", bytes)});
}

}  // namespace

WritableMemfd WritableMemfd::create(const std::string& name, int64_t bytes) {
  check_bytes("memfd " + name, bytes);
  check_file_size_limit(name, bytes);
  check_available_memory(name, bytes);
  WritableMemfd memory;
  memory.fd_ = create_memfd(name);
  if (memory.fd_ < 0) {
    fail_create(ErrorCode::kResourceExhausted, name, bytes, "memfd_create", errno);
  }
  return memory;
}

void WritableMemfd::map(const std::string& name, int64_t bytes) {
  void* data =
      ::mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  if (data == MAP_FAILED) fail_create(ErrorCode::kResourceExhausted, name, bytes, "mmap", errno);
  data_ = static_cast<std::byte*>(data);
  size_ = static_cast<size_t>(bytes);
  // Fails only on kernels without dumps; then nothing needs to be left out of them.
  static_cast<void>(::madvise(data, size_, MADV_DONTDUMP));
}

void WritableMemfd::unmap() {
  if (data_ != nullptr) ::munmap(std::exchange(data_, nullptr), size_);
}

WritableMemfd::~WritableMemfd() {
  unmap();
  if (fd_ >= 0) ::close(fd_);
}

WritableMemfd::WritableMemfd(WritableMemfd&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

WritableMemfd& WritableMemfd::operator=(WritableMemfd&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

SealedSegment SealedSegment::create(const std::string& name, int64_t bytes) {
  SealedSegment segment;
  segment.memory_ = WritableMemfd::create(name, bytes);
  allocate_pages(segment.fd(), name, bytes);
  segment.memory_.map(name, bytes);
  // Last: F_SEAL_FUTURE_WRITE spares the maps that exist, and no other.
  if (::fcntl(segment.fd(), F_ADD_SEALS, kOwnerSeals) != 0) {
    fail_create(ErrorCode::kUnsupported, name, bytes, "F_ADD_SEALS " + seal_names(kOwnerSeals),
                errno);
  }
  return segment;
}

OpenSegment OpenSegment::create(const std::string& name, int64_t bytes) {
  OpenSegment segment;
  segment.memory_ = WritableMemfd::create(name, bytes);
  if (::ftruncate(segment.fd(), bytes) != 0) {
    fail_create(ErrorCode::kResourceExhausted, name, bytes, "ftruncate", errno);
  }
  segment.memory_.map(name, bytes);
  static_cast<void>(::madvise(segment.memory_.data(), segment.memory_.size(), MADV_HUGEPAGE));
  return segment;
}

void OpenSegment::write(int64_t offset, std::span<const std::byte> bytes) {
  if (memory_.data() == nullptr || offset < 0 ||
      bytes.size() > memory_.size() - std::min(memory_.size(), static_cast<size_t>(offset))) {
    fail_invariant("a write outside of an open segment");
  }
  // Asked for first: where memory ends, the touch of a page would be a signal, this is an error.
  // Kernels before 5.14 do not know it, and are not asked.
  constexpr size_t kPage = 4096;
  const size_t begin = static_cast<size_t>(offset) / kPage * kPage;
  const size_t end = static_cast<size_t>(offset) + bytes.size();
  if (::madvise(memory_.data() + begin, end - begin, kPopulateWrite) != 0 && errno != EINVAL) {
    fail_create(ErrorCode::kResourceExhausted, "segment", num_bytes(), "MADV_POPULATE_WRITE",
                errno);
  }
  std::memcpy(memory_.data() + offset, bytes.data(), bytes.size());
}

void OpenSegment::seal() {
  if (memory_.data() == nullptr) return;
  // The kernel refuses F_SEAL_WRITE while a writable map exists.
  memory_.unmap();
  if (::fcntl(fd(), F_ADD_SEALS, kPeerSeals | F_SEAL_SEAL) != 0) {
    fail_create(ErrorCode::kUnsupported, "segment", num_bytes(),
                "F_ADD_SEALS " + seal_names(kPeerSeals), errno);
  }
}

MappedSegment MappedSegment::map(int fd, int64_t bytes, int required_seals,
                                 const std::string& origin) {
  check_bytes("segment of " + origin, bytes);
  check_seals(fd, required_seals, origin);
  check_size(fd, bytes, origin);
  // Private, because kernels before 6.7 refuse shared maps of a memfd sealed against writing.
  void* data = ::mmap(nullptr, static_cast<size_t>(bytes), PROT_READ, MAP_PRIVATE, fd, 0);
  if (data == MAP_FAILED) {
    throw Error({.code = ErrorCode::kResourceExhausted,
                 .field = "memfd map",
                 .value = fmt::format("{} bytes", bytes),
                 .origin = origin,
                 .message = fmt::format("mmap: {}", std::strerror(errno))});
  }
  MappedSegment segment;
  segment.data_ = static_cast<const std::byte*>(data);
  segment.size_ = static_cast<size_t>(bytes);
  return segment;
}

MappedSegment::~MappedSegment() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedSegment::MappedSegment(MappedSegment&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedSegment& MappedSegment::operator=(MappedSegment&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace rollpack::bridge
