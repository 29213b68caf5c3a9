#include "kernels/cpu/arena.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::kernels::cpu {
namespace {

constexpr int64_t kHugePageBytes = int64_t{2} << 20;
constexpr int kRequiredSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

[[noreturn]] void fail_memory(const char* what, int64_t bytes) {
  throw Error({.code = ErrorCode::kResourceExhausted,
               .field = what,
               .value = fmt::format("{} bytes", bytes),
               .message = fmt::format("the system refused the memory: {}", std::strerror(errno))});
}

// Reserves `bytes` at a 2 MiB boundary, inaccessible; the caller maps over it.
std::byte* reserve_aligned(int64_t bytes, const char* what) {
  const auto size = static_cast<size_t>(bytes + kHugePageBytes);
  void* raw = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) fail_memory(what, bytes);
  auto* begin = static_cast<std::byte*>(raw);
  const auto address = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t head = (kHugePageBytes - address % kHugePageBytes) % kHugePageBytes;
  if (head != 0) munmap(begin, head);
  const size_t tail = static_cast<size_t>(kHugePageBytes) - head;
  munmap(begin + head + bytes, tail);
  return begin + head;
}

// Zeros, page by page as they are touched.
void back_with_memory(std::byte* at, int64_t bytes, const char* what) {
  const auto size = static_cast<size_t>(bytes);
  if (mmap(at, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
      MAP_FAILED) {
    fail_memory(what, bytes);
  }
  // Advice only: without huge pages everything works, slower.
  madvise(at, size, MADV_HUGEPAGE);
}

int64_t round_to_huge_pages(int64_t bytes) {
  return (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
}

int make_memfd(int64_t bytes, const char* what) {
  int fd = memfd_create("rollpack-weights", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
  // Linux before 6.3 does not know MFD_NOEXEC_SEAL.
  if (fd < 0 && errno == EINVAL) {
    fd = memfd_create("rollpack-weights", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  }
  if (fd < 0) fail_memory(what, bytes);
  if (ftruncate(fd, bytes) != 0) {
    close(fd);
    fail_memory(what, bytes);
  }
  return fd;
}

}  // namespace

Arena Arena::make_private(int64_t bytes, const char* what) {
  Arena arena;
  const int64_t mapped = round_to_huge_pages(bytes);
  std::byte* at = reserve_aligned(mapped, what);
  arena.data_ = at;
  arena.bytes_ = mapped;
  back_with_memory(at, mapped, what);
  return arena;
}

Arena Arena::make_shareable(int64_t bytes, const char* what) {
  Arena arena;
  const int64_t mapped = round_to_huge_pages(bytes);
  arena.fd_ = make_memfd(mapped, what);
  std::byte* at = reserve_aligned(mapped, what);
  arena.data_ = at;
  arena.bytes_ = mapped;
  if (mmap(at, static_cast<size_t>(mapped), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
           arena.fd_, 0) == MAP_FAILED) {
    fail_memory(what, bytes);
  }
  madvise(at, static_cast<size_t>(mapped), MADV_HUGEPAGE);
  return arena;
}

Arena Arena::adopt(int fd, int64_t bytes) {
  const int64_t expected = round_to_huge_pages(bytes);
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & kRequiredSeals) != kRequiredSeals) {
    throw Error({.code = ErrorCode::kDataLoss,
                 .field = "weights descriptor",
                 .value = seals < 0 ? "not a memfd" : fmt::format("seals 0x{:x}", seals),
                 .allowed = fmt::format("seals 0x{:x} (shrink, grow, write)", kRequiredSeals),
                 .message = "memory that its writer can still change is not adopted"});
  }
  struct stat status = {};
  if (fstat(fd, &status) != 0 || status.st_size != expected) {
    throw Error({.code = ErrorCode::kDataLoss,
                 .field = "weights descriptor",
                 .value = fmt::format("{} bytes", static_cast<int64_t>(status.st_size)),
                 .allowed = fmt::format("{} bytes", expected),
                 .message = "the packed weights are of another model or layout"});
  }
  Arena arena;
  std::byte* at = reserve_aligned(expected, "weights");
  arena.data_ = at;
  arena.bytes_ = expected;
  arena.is_read_only_ = true;
  // Private: Linux before 6.7 refuses a shared mapping of a write-sealed memfd.
  if (mmap(at, static_cast<size_t>(expected), PROT_READ, MAP_PRIVATE | MAP_FIXED, fd, 0) ==
      MAP_FAILED) {
    fail_memory("weights", expected);
  }
  return arena;
}

Arena::Arena(Arena&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      fd_(std::exchange(other.fd_, -1)),
      is_read_only_(std::exchange(other.is_read_only_, false)),
      is_released_(std::exchange(other.is_released_, false)) {}

Arena& Arena::operator=(Arena&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(fd_, other.fd_);
  std::swap(is_read_only_, other.is_read_only_);
  std::swap(is_released_, other.is_released_);
  return *this;
}

Arena::~Arena() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(bytes_));
  if (fd_ >= 0) close(fd_);
}

void Arena::populate(int64_t begin, int64_t end) {
  begin = begin / kHugePageBytes * kHugePageBytes;
  end = std::min(round_to_huge_pages(end), bytes_);
  // Linux before 5.14 refuses: then every page waits for its first write.
  if (begin < end) madvise(data_ + begin, static_cast<size_t>(end - begin), MADV_POPULATE_WRITE);
}

// Mapped over in one call, so that the range is ours throughout.
void Arena::release() {
  if (is_released_) return;
  if (fd_ >= 0 || is_read_only_) fail_invariant("only private memory is given back and taken");
  if (mmap(data_, static_cast<size_t>(bytes_), PROT_NONE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED) {
    fail_memory("memory given back", bytes_);
  }
  is_released_ = true;
}

void Arena::take() {
  if (!is_released_) return;
  back_with_memory(data_, bytes_, "memory taken again");
  is_released_ = false;
}

double Arena::huge_page_share() const {
  unsigned sum = 0;
  for (int64_t at = 0; at < bytes_; at += kHugePageBytes) {
    sum += std::to_integer<unsigned>(static_cast<const volatile std::byte*>(data_)[at]);
  }
  (void)sum;
  const auto begin = reinterpret_cast<uintptr_t>(data_), end = begin + static_cast<size_t>(bytes_);
  std::ifstream smaps("/proc/self/smaps");
  bool is_ours = false;
  int64_t resident = 0, huge = 0;
  for (std::string line; std::getline(smaps, line);) {
    unsigned long from = 0, to = 0;
    long kibibytes = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &from, &to) == 2) {
      is_ours = from < end && begin < to;
    } else if (is_ours && std::sscanf(line.c_str(), "Rss: %ld kB", &kibibytes) == 1) {
      resident += kibibytes;
    } else if (is_ours && (std::sscanf(line.c_str(), "AnonHugePages: %ld kB", &kibibytes) == 1 ||
                           std::sscanf(line.c_str(), "ShmemPmdMapped: %ld kB", &kibibytes) == 1 ||
                           std::sscanf(line.c_str(), "FilePmdMapped: %ld kB", &kibibytes) == 1)) {
      huge += kibibytes;
    }
  }
  return resident > 0 ? static_cast<double>(huge) / static_cast<double>(resident) : 0;
}

void Arena::seal() {
  if (is_read_only_) return;
  if (fd_ < 0) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "shared_weights",
                 .value = "false",
                 .allowed = "true",
                 .message = "private weights have no descriptor to export"});
  }
  // The kernel refuses the seal while a writable shared mapping exists. Mapping over it in one call
  // keeps the address range ours throughout.
  if (mmap(data_, static_cast<size_t>(bytes_), PROT_NONE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED ||
      fcntl(fd_, F_ADD_SEALS, kRequiredSeals | F_SEAL_SEAL) != 0 ||
      mmap(data_, static_cast<size_t>(bytes_), PROT_READ, MAP_PRIVATE | MAP_FIXED, fd_, 0) ==
          MAP_FAILED) {
    fail_memory("weights", bytes_);
  }
  is_read_only_ = true;
}

}  // namespace rollpack::kernels::cpu
