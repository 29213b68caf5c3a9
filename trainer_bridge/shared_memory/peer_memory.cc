#include "trainer_bridge/shared_memory/peer_memory.h"

#include <fmt/format.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "kernels/base/error.h"

namespace rollpack::bridge {
namespace {

ErrorInfo read_error(pid_t pid, uint64_t address, size_t num_bytes, int error) {
  ErrorInfo info{.code = ErrorCode::kInvalidArgument,
                 .field = "address",
                 .value = fmt::format("{} bytes at {:#x}", num_bytes, address),
                 .origin = fmt::format("process {}: {}", pid, std::strerror(error)),
                 .allowed = "ordinary memory of the process that lends it",
                 .message = "send copies instead: update_weights(.., copy=True)"};
  if (error == ESRCH) {
    info.code = ErrorCode::kUnavailable;
    info.message = "the process has ended";
  } else if (error != EFAULT) {
    info.code = ErrorCode::kFailedPrecondition;
  }
  return info;
}

}  // namespace

void PeerMemory::read(uint64_t address, std::span<std::byte> bytes) const {
  // One call reads no more than 2 GiB, and stops early at the first page that is not there.
  for (size_t done = 0; done < bytes.size();) {
    const iovec local{bytes.data() + done, bytes.size() - done};
    // An address of the other process, which means nothing in this one.
    const iovec remote{reinterpret_cast<void*>(address + done), bytes.size() - done};
    const ssize_t count = ::process_vm_readv(pid_, &local, 1, &remote, 1, 0);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      throw Error(read_error(pid_, address, bytes.size(), count < 0 ? errno : EFAULT));
    }
    done += static_cast<size_t>(count);
  }
}

bool PeerMemory::holds(uint64_t address, std::span<const std::byte> expected) const {
  if (!is_known()) return false;
  std::vector<std::byte> found(expected.size());
  try {
    read(address, found);
  } catch (const Error&) {
    return false;
  }
  return std::ranges::equal(found, expected);
}

}  // namespace rollpack::bridge
