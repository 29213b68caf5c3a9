// Memory that came to this rank from another node, piece by piece. Thread-safe.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "rollout/cluster/memory_frames.h"
#include "trainer_bridge/shared_memory/segment.h"
#include "trainer_bridge/wire/owned_fd.h"

namespace rollpack::rollout {

class ReceivedMemory {
 public:
  static constexpr uint64_t kFromRank0 = 0;

  // Keeps a piece; what to tell rank 0, if anything. Sealed with the last one. `source` is who sent
  // it: pieces of one that has been replaced by another, rank 0 above all, count for nothing.
  std::optional<MemoryState> write(const MemoryPiece& piece, uint64_t source = kFromRank0);
  // Whoever passes it on meanwhile goes on with what is there.
  void drop(uint64_t memory);
  bool is_dropped(uint64_t memory) const;
  // A descriptor of what is complete.
  std::optional<bridge::OwnedFd> copy_of(uint64_t memory) const;

  // For passing on what has come of a memory, and what is yet to come.
  class Reader;
  // Waits for its first piece; nullopt when that does not come in time, or has been dropped.
  std::optional<Reader> reader_of(uint64_t memory,
                                  std::chrono::steady_clock::time_point deadline) const;

 private:
  struct Held {
    explicit Held(bridge::OpenSegment opened) : segment(std::move(opened)) {}

    bridge::OpenSegment segment;
    uint64_t source = 0;
    int64_t num_bytes = 0;       // that have come
    std::vector<uint32_t> sums;  // of the pieces, as they came
    bool is_dropped = false;

    bool is_complete() const { return num_bytes == segment.num_bytes(); }
  };

  std::shared_ptr<Held> place_for(const MemoryPiece& piece, uint64_t source);

  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::map<uint64_t, std::shared_ptr<Held>> held_;
  uint64_t last_dropped_ = 0;  // numbers rise: what was before it does not come any more
};

class ReceivedMemory::Reader {
 public:
  // The next piece, in `buffer`; nullopt at the end, or where it does not come in time.
  std::optional<MemoryPiece> next(std::vector<uint8_t>& buffer,
                                  std::chrono::steady_clock::time_point deadline);
  bool is_at_end() const { return offset_ == total_bytes_; }
  // No more of it will come.
  bool is_dropped() const;

 private:
  friend class ReceivedMemory;
  Reader(const ReceivedMemory& owner, uint64_t memory, std::shared_ptr<Held> held)
      : owner_(&owner),
        memory_(memory),
        held_(std::move(held)),
        total_bytes_(held_->segment.num_bytes()) {}

  const ReceivedMemory* owner_;
  uint64_t memory_;
  std::shared_ptr<Held> held_;
  int64_t total_bytes_;
  int64_t offset_ = 0;
};

}  // namespace rollpack::rollout
