// Large memory of the CPU backend: zero-filled, in 2 MiB pages where the system grants them
// (weights stream 1.6 times faster from those than from 4 KiB pages), private to the process or
// shareable through a sealed descriptor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rollpack::kernels::cpu {

class Arena {
 public:
  Arena() = default;
  // Private memory. Errors: resource_exhausted naming `what` and the bytes.
  static Arena make_private(int64_t bytes, const char* what);
  // Memory backed by a descriptor that seal() makes fit for export. Errors: as make_private.
  static Arena make_shareable(int64_t bytes, const char* what);
  // Maps a descriptor that another process sealed, read-only; takes no ownership of fd.
  // Errors: data_loss if a seal is missing or the size is not `bytes`.
  static Arena adopt(int fd, int64_t bytes);

  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;
  ~Arena();

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  bool is_empty() const { return data_ == nullptr; }
  bool is_read_only() const { return is_read_only_; }
  // Descriptor of a shareable arena, owned by it; -1 of a private one.
  int fd() const { return fd_; }

  // Has the system back [begin, end) with zeroed memory now rather than at the first write. Bounds
  // are rounded outwards to 2 MiB. Where that fails, the first write does it.
  void populate(int64_t begin, int64_t end);

  // Gives the memory of a private arena back to the system and keeps its addresses, which nobody
  // may touch until take() has backed them with zeros again. Errors: resource_exhausted if the
  // system refuses; the arena is then as before.
  void release();
  void take();
  bool is_released() const { return is_released_; }

  // Share of the memory in use, 0 to 1, that the system really put into huge pages, from
  // /proc/self/smaps; 0 where that cannot be read. Touches every page; takes some milliseconds.
  double huge_page_share() const;

  // Ends writing for good: seals the descriptor and maps it again read-only, at the same address.
  // Errors: failed_precondition if the arena is private.
  void seal();

 private:
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
  int fd_ = -1;
  bool is_read_only_ = false;
  bool is_released_ = false;
};

}  // namespace rollpack::kernels::cpu
