#include "rollout/cluster/received_memory.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "kernels/base/checksum.h"
#include "kernels/base/error.h"

namespace rollpack::rollout {

// Where a piece goes; none where it counts for nothing. Errors: those of OpenSegment::create.
std::shared_ptr<ReceivedMemory::Held> ReceivedMemory::place_for(const MemoryPiece& piece,
                                                                uint64_t source) {
  const auto found = held_.find(piece.memory);
  if (found != held_.end()) {
    const Held& held = *found->second;
    if (held.is_complete()) return nullptr;
    if (held.source == source && piece.offset > 0) return found->second;
    if (held.source == kFromRank0 && source != kFromRank0) return nullptr;  // it has taken over
  }
  if (piece.offset > 0) return nullptr;  // dropped, or another source has begun anew
  auto held = std::make_shared<Held>(
      bridge::OpenSegment::create("rollpack-node-memory", static_cast<int64_t>(piece.total_bytes)));
  held->source = source;
  if (found != held_.end()) found->second->is_dropped = true;
  held_[piece.memory] = held;
  return held;
}

std::optional<MemoryState> ReceivedMemory::write(const MemoryPiece& piece, uint64_t source) {
  const std::lock_guard lock(mutex_);
  MemoryState state{.memory = piece.memory, .num_bytes = 0, .error = {}};
  try {
    const std::shared_ptr<Held> held = place_for(piece, source);
    if (!held) {
      const auto found = held_.find(piece.memory);
      if (found == held_.end() || !found->second->is_complete()) return std::nullopt;
      state.num_bytes = static_cast<uint64_t>(found->second->num_bytes);
      return state;
    }
    const int64_t left = held->segment.num_bytes() - held->num_bytes;
    const bool is_next =
        static_cast<int64_t>(piece.offset) == held->num_bytes &&
        static_cast<int64_t>(piece.total_bytes) == held->segment.num_bytes() &&
        static_cast<int64_t>(piece.bytes.size()) == std::min<int64_t>(kMaxPieceBytes, left);
    const uint32_t crc = crc32_of(std::as_bytes(piece.bytes));
    if (!is_next || crc != piece.crc) {
      throw Error({.code = ErrorCode::kDataLoss,
                   .field = fmt::format("piece at {} of {} bytes", piece.offset, piece.total_bytes),
                   .value = fmt::format("crc32 {:08x}", crc),
                   .allowed = fmt::format("{:08x} at {}", piece.crc, held->num_bytes),
                   .message = "the piece is not what rank 0 has sent"});
    }
    held->segment.write(held->num_bytes, std::as_bytes(piece.bytes));
    held->num_bytes += static_cast<int64_t>(piece.bytes.size());
    held->sums.push_back(crc);
    state.num_bytes = static_cast<uint64_t>(held->num_bytes);
    if (held->is_complete()) held->segment.seal();
  } catch (const Error& error) {
    if (const auto found = held_.find(piece.memory); found != held_.end()) {
      found->second->is_dropped = true;
      held_.erase(found);
    }
    state.error = error.what();
  }
  changed_.notify_all();
  return state;
}

void ReceivedMemory::drop(uint64_t memory) {
  const std::lock_guard lock(mutex_);
  last_dropped_ = std::max(last_dropped_, memory);
  const auto found = held_.find(memory);
  if (found != held_.end()) {
    found->second->is_dropped = true;
    held_.erase(found);
  }
  changed_.notify_all();
}

bool ReceivedMemory::is_dropped(uint64_t memory) const {
  const std::lock_guard lock(mutex_);
  return memory <= last_dropped_ && !held_.contains(memory);
}

std::optional<bridge::OwnedFd> ReceivedMemory::copy_of(uint64_t memory) const {
  const std::lock_guard lock(mutex_);
  const auto found = held_.find(memory);
  if (found == held_.end() || !found->second->is_complete()) return std::nullopt;
  return bridge::OwnedFd::duplicate(found->second->segment.fd());
}

std::optional<ReceivedMemory::Reader> ReceivedMemory::reader_of(
    uint64_t memory, std::chrono::steady_clock::time_point deadline) const {
  std::unique_lock lock(mutex_);
  changed_.wait_until(lock, deadline,
                      [&] { return held_.contains(memory) || memory <= last_dropped_; });
  const auto found = held_.find(memory);
  if (found == held_.end()) return std::nullopt;
  return Reader(*this, memory, found->second);
}

bool ReceivedMemory::Reader::is_dropped() const {
  const std::lock_guard lock(owner_->mutex_);
  return held_->is_dropped && !held_->is_complete();
}

std::optional<MemoryPiece> ReceivedMemory::Reader::next(
    std::vector<uint8_t>& buffer, std::chrono::steady_clock::time_point deadline) {
  const auto size = std::min<int64_t>(static_cast<int64_t>(kMaxPieceBytes), total_bytes_ - offset_);
  if (size == 0) return std::nullopt;
  MemoryPiece piece{.memory = memory_,
                    .total_bytes = static_cast<uint64_t>(total_bytes_),
                    .offset = static_cast<uint64_t>(offset_),
                    .bytes = {},
                    .crc = 0};
  {
    std::unique_lock lock(owner_->mutex_);
    const auto is_there = [&] { return held_->num_bytes >= offset_ + size; };
    const auto is_over = [&] { return is_there() || held_->is_dropped; };
    owner_->changed_.wait_until(lock, deadline, is_over);
    if (!is_there()) return std::nullopt;
    piece.crc = held_->sums[static_cast<size_t>(piece.offset / kMaxPieceBytes)];
  }
  buffer.resize(static_cast<size_t>(size));
  if (::pread(held_->segment.fd(), buffer.data(), buffer.size(), offset_) != size) {
    return std::nullopt;
  }
  piece.bytes = buffer;
  offset_ += size;
  return piece;
}

}  // namespace rollpack::rollout
