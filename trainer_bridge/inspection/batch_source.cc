#include "trainer_bridge/inspection/batch_source.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <new>
#include <span>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"
#include "trainer_bridge/contract/batch_schema.h"
#include "trainer_bridge/inspection/batch_table.h"
#include "trainer_bridge/shared_memory/segment.h"
#include "trainer_bridge/wire/fields.h"
#include "trainer_bridge/wire/frame.h"
#include "trainer_bridge/wire/message.h"

namespace rollpack::bridge {
namespace {

constexpr int kMaxLooks = 20;  // at a slot that is filled again each time

OwnedFd open_batch_file(const std::string& path) {
  // Not blocking: a FIFO without a writer would wait here for ever.
  OwnedFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (fd) return fd;
  throw Error({.code = errno == ENOENT ? ErrorCode::kNotFound : ErrorCode::kUnavailable,
               .field = "BATCH",
               .value = path,
               .allowed = "a batch file, or the socket of a running server",
               .message = std::strerror(errno)});
}

uint64_t size_of(const OwnedFd& fd, const std::string& path) {
  struct stat status = {};
  if (::fstat(fd.get(), &status) == 0 && S_ISREG(status.st_mode)) {
    return static_cast<uint64_t>(status.st_size);
  }
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = "BATCH",
               .value = path,
               .allowed = "a regular file, or the socket of a running server"});
}

void read_all(const OwnedFd& fd, std::span<std::byte> bytes, const std::string& path) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got =
        ::pread(fd.get(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      throw Error({.code = ErrorCode::kDataLoss,
                   .field = "BATCH",
                   .value = path,
                   .message = got < 0 ? std::strerror(errno) : "it became shorter while read"});
    }
    done += static_cast<size_t>(got);
  }
}

std::vector<std::byte> allocated(uint64_t num_bytes, const std::string& origin) {
  try {
    return std::vector<std::byte>(num_bytes);
  } catch (const std::bad_alloc&) {
    throw Error({.code = ErrorCode::kResourceExhausted,
                 .field = "memory",
                 .value = fmt::format("{} bytes", num_bytes),
                 .origin = origin,
                 .message = "the batch does not fit"});
  }
}

OwnedFd connected(const std::string& path) {
  OwnedFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "BATCH",
                 .value = path,
                 .allowed = fmt::format("a socket's path of at most {} bytes",
                                        sizeof address.sun_path - 1)});
  }
  std::copy(path.begin(), path.end(), address.sun_path);
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) {
    return socket;
  }
  throw Error({.code = ErrorCode::kUnavailable,
               .field = "BATCH",
               .value = path,
               .allowed = "the socket of a running server",
               .message = std::strerror(errno)});
}

// A slot of the server that has been filled at least once.
struct Slot {
  int64_t number = 0;
  std::string state;
  MappedSegment memory;
};

std::vector<Slot> ask_for_slots(const std::string& path, Deadline deadline) {
  const OwnedFd socket = connected(path);
  send_frame(socket.get(), encode_message({{"verb", "inspect"}, {"id", 1}}), {}, deadline);
  const std::optional<Frame> frame = receive_frame(socket.get(), deadline);
  if (!frame) {
    throw Error({.code = ErrorCode::kUnavailable,
                 .field = "BATCH",
                 .value = path,
                 .message = "the server closed the connection"});
  }
  const Json reply = decode_message(frame->body);
  const std::string origin = "the reply of " + path;
  Fields fields(reply, "", origin);
  if (!fields.optional_boolean("ok").value_or(false)) {
    throw Error(error_from_map(fields.any("error")));
  }
  const int64_t slot_bytes = fields.integer("slot_bytes", 1, kMaxI64);
  const Json& listed = fields.array("slots");
  if (listed.size() != frame->fds.size()) {
    fields.refuse("slots", listed, fmt::format("one a descriptor, {}", frame->fds.size()));
  }
  std::vector<Slot> slots;
  for (size_t i = 0; i < listed.size(); ++i) {
    Fields slot(listed[i], fmt::format("slots[{}]", i), origin);
    const int64_t number = slot.integer("slot", 0, kMaxFdsPerFrame);
    slots.push_back({number, slot.text("state"),
                     MappedSegment::map(frame->fds[i].get(), slot_bytes, F_SEAL_SHRINK, path)});
  }
  return slots;
}

BatchHeader header_in(const Slot& slot) {
  BatchHeader header;
  const std::span<const std::byte> bytes = slot.memory.bytes();
  if (bytes.size() < sizeof header) return {.magic = {}};
  std::memcpy(&header, bytes.data(), sizeof header);
  return header;
}

// The slot asked for, or the one with the latest batch; null where there is none.
const Slot* chosen(const std::vector<Slot>& slots, std::optional<int32_t> number) {
  const Slot* best = nullptr;
  for (const Slot& slot : slots) {
    const BatchHeader header = header_in(slot);
    if (header.magic != kBatchMagic || (number && slot.number != *number)) continue;
    if (best == nullptr || header.batch_seq > header_in(*best).batch_seq) best = &slot;
  }
  return best;
}

// Nothing where the slot was written to while it was copied.
std::optional<BatchCopy> copy_of(const Slot& slot, const std::string& path) {
  const std::span<const std::byte> memory = slot.memory.bytes();
  const BatchHeader header = header_in(slot);
  if (header.bytes < sizeof header || header.bytes > memory.size()) return std::nullopt;
  BatchCopy copy{.origin = fmt::format("{} slot {}", path, slot.number), .state = slot.state};
  copy.bytes = allocated(header.bytes, copy.origin);
  std::copy_n(memory.begin(), header.bytes, copy.bytes.begin());
  const std::span<const std::byte> body = std::span(copy.bytes).subspan(sizeof header);
  BatchHeader after;
  std::memcpy(&after, copy.bytes.data(), sizeof after);
  if (after.crc32 != crc32_of(body) || after.bytes != header.bytes) return std::nullopt;
  return copy;
}

}  // namespace

BatchCopy read_batch_file(const std::string& path) {
  const OwnedFd fd = open_batch_file(path);
  const uint64_t num_bytes = size_of(fd, path);
  std::array<std::byte, sizeof(BatchHeader)> head;
  const auto head_bytes = std::span(head).first(std::min<uint64_t>(num_bytes, head.size()));
  read_all(fd, head_bytes, path);
  read_batch_header(head_bytes, num_bytes, path);
  BatchCopy copy{.origin = path, .bytes = allocated(num_bytes, path)};
  read_all(fd, copy.bytes, path);
  return copy;
}

BatchCopy copy_from_server(const std::string& path, std::optional<int32_t> slot,
                           std::chrono::milliseconds timeout) {
  const Deadline deadline = std::chrono::steady_clock::now() + timeout;
  for (int look = 0; look < kMaxLooks; ++look) {
    const std::vector<Slot> slots = ask_for_slots(path, deadline);
    const Slot* found = chosen(slots, slot);
    if (found == nullptr) {
      throw Error({.code = ErrorCode::kNotFound,
                   .field = slot ? "--slot" : "batch",
                   .value = slot ? std::to_string(*slot) : "none",
                   .origin = path,
                   .allowed = "a slot that holds a batch",
                   .message = "nothing was delivered in it yet"});
    }
    if (auto copy = copy_of(*found, path)) return *std::move(copy);
  }
  throw Error({.code = ErrorCode::kUnavailable,
               .field = "slots",
               .value = fmt::format("{} looks", kMaxLooks),
               .origin = path,
               .message = "each was filled again while it was copied; try again"});
}

}  // namespace rollpack::bridge
