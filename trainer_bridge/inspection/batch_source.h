// Where a batch to look at comes from: a file that holds the bytes of one, or a slot of a running
// server. Either way the bytes are a copy, so that nothing can change them while they are read.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace rollpack::bridge {

struct BatchCopy {
  std::string origin;            // file, or socket and slot
  std::string state;             // of a slot: who has it; empty for a file
  std::vector<std::byte> bytes;  // the whole batch; only its header and checksum are checked
};

// Errors: not_found; invalid_argument for a folder, FIFO or device; resource_exhausted where it
// does not fit into memory; those of read_batch_table() for header and size.
BatchCopy read_batch_file(const std::string& path);

// Looks into the slots of the server at socket `path` by the verb `inspect`: no hello, nothing
// taken, nothing acknowledged. A slot that is filled again meanwhile is looked at again.
//   slot  which one; none: the one with the latest batch
// Errors: unavailable where nobody listens; not_found where no slot, or not that one, holds a
// batch; deadline_exceeded; those that the server answers.
BatchCopy copy_from_server(const std::string& path, std::optional<int32_t> slot,
                           std::chrono::milliseconds timeout = std::chrono::seconds(5));

}  // namespace rollpack::bridge
