// Memory of another process, read where it lies, so that nothing has to be copied to be sent.
// Source: process_vm_readv(2); who may is said in ptrace(2), "Ptrace access mode checking".
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace rollpack::bridge {

class PeerMemory {
 public:
  // Of process `pid`, as this process's pid namespace numbers it; of none where it is 0.
  explicit PeerMemory(pid_t pid) : pid_(pid) {}

  bool is_known() const { return pid_ != 0; }

  // Copies the bytes at `address` there. Any thread.
  // Errors: invalid_argument where no such memory is; failed_precondition where the system does not
  // let this process read it; unavailable where the process has ended.
  void read(uint64_t address, std::span<std::byte> bytes) const;

  // Whether it can be read and `expected` is at `address`: that process and this one number
  // processes alike, and no policy of the system stands between them.
  bool holds(uint64_t address, std::span<const std::byte> expected) const;

 private:
  const pid_t pid_;
};

}  // namespace rollpack::bridge
