// Memory that crosses processes as a file descriptor: segments of our own, sealed so that no peer
// can resize or write them, and read-only maps of a peer's, which are trusted only once sealed.
// Source: memfd_create(2), fcntl(2) on file sealing.
#pragma once

#include <fcntl.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace rollpack::bridge {

// What our segments carry: only the map that made them can ever write.
inline constexpr int kOwnerSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
// What a peer's segment must carry before we read it: its bytes and its size are final, so what was
// checked is what is used, and no access can end in SIGBUS.
inline constexpr int kPeerSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;

// A memfd and the writable map of it that this process has: what our segments are made of. Left out
// of core dumps.
class WritableMemfd {
 public:
  // An empty one. Errors: invalid_argument for bytes < 1; resource_exhausted where descriptors,
  // memory or `ulimit -f` do not allow `bytes` now.
  static WritableMemfd create(const std::string& name, int64_t bytes);

  WritableMemfd() = default;
  ~WritableMemfd();
  WritableMemfd(WritableMemfd&& other) noexcept;
  WritableMemfd& operator=(WritableMemfd&& other) noexcept;

  // Maps the first `bytes` bytes; the file has them. Errors: resource_exhausted.
  void map(const std::string& name, int64_t bytes);
  void unmap();  // the size stays

  int fd() const { return fd_; }
  std::byte* data() const { return data_; }  // none while not mapped
  size_t size() const { return size_; }

 private:
  int fd_ = -1;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Owns a sealed memfd and the one writable map of it. Memory returns to the system when the last
// holder of a map or descriptor, peers included, has let go.
class SealedSegment {
 public:
  // Creates, allocates every page, maps and seals. `name` shows in /proc/PID/fd and in errors.
  // Errors: resource_exhausted where memory, descriptors or `ulimit -f` do not allow `bytes` now;
  // invalid_argument for bytes < 1; unsupported where the kernel lacks a seal (before Linux 5.1).
  static SealedSegment create(const std::string& name, int64_t bytes);

  // Descriptor to pass on; stays ours, close-on-exec.
  int fd() const { return memory_.fd(); }
  std::span<std::byte> bytes() { return {memory_.data(), memory_.size()}; }
  std::span<const std::byte> bytes() const { return {memory_.data(), memory_.size()}; }

 private:
  SealedSegment() = default;

  WritableMemfd memory_;
};

// A memfd that is written here, piece by piece, and then never again by anyone.
class OpenSegment {
 public:
  // Creates it; pages are taken as they are written. Huge ones where the system has them.
  // Errors: those of SealedSegment::create.
  static OpenSegment create(const std::string& name, int64_t bytes);

  int64_t num_bytes() const { return static_cast<int64_t>(memory_.size()); }
  // Errors: resource_exhausted where there is no memory for them.
  void write(int64_t offset, std::span<const std::byte> bytes);
  // No write() after it. Sets kPeerSeals. Errors: unsupported where the kernel refuses.
  void seal();
  // Descriptor to pass on once sealed; stays ours, close-on-exec.
  int fd() const { return memory_.fd(); }

 private:
  OpenSegment() = default;

  WritableMemfd memory_;  // not mapped once sealed
};

// Read-only, private map of the first bytes of a peer's memfd.
class MappedSegment {
 public:
  // Maps `bytes` bytes of `fd`, which stays the caller's and may be closed afterwards.
  //   required_seals  all must be set already, e.g. kPeerSeals
  //   origin          who sent it, for errors
  // Errors: invalid_argument for bytes < 1 and for what is no memfd (pipes, sockets, disk files);
  // data_loss for missing seals and for a size below `bytes`; resource_exhausted where the map
  // fails.
  static MappedSegment map(int fd, int64_t bytes, int required_seals, const std::string& origin);

  ~MappedSegment();
  MappedSegment(MappedSegment&& other) noexcept;
  MappedSegment& operator=(MappedSegment&& other) noexcept;

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  MappedSegment() = default;

  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace rollpack::bridge
