// The slots that batches travel in, one sealed segment each, and who holds which. The state lives
// in this process alone: a slot changes hands by a message, never by a flag in shared memory, so a
// peer that dies or lies can corrupt nothing here.
//
//   free --acquire--> filling --deliver--> delivered --release--> free
//                        |  ^                  |
//         free <--cancel-+  +----recall_all----+   (its client is gone: the bytes are kept)
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "trainer_bridge/shared_memory/segment.h"

namespace rollpack::bridge {

// One filling of one slot.
struct SlotLease {
  int32_t slot = 0;
  uint64_t generation = 0;  // counts fillings of this slot, from 1

  bool operator==(const SlotLease&) const = default;
};

enum class SlotState : uint8_t { kFree, kFilling, kDelivered };

// Used by one thread. Slot numbers that this process makes up are invariants (internal); those of
// release() come from a client.
class SlotRing {
 public:
  // Errors: invalid_argument naming bridge.slots or bridge.slot_bytes (1 or more); those of
  // SealedSegment::create().
  SlotRing(int32_t num_slots, int64_t slot_bytes);

  int32_t num_slots() const { return static_cast<int32_t>(slots_.size()); }
  int64_t slot_bytes() const { return slot_bytes_; }
  int32_t num_free() const;
  SlotState state(int32_t slot) const { return slot_at(slot).state; }
  // Fillings of the slot so far; 0: it never held a batch.
  uint64_t generation(int32_t slot) const { return slot_at(slot).generation; }

  // The lowest free slot, now filling under a new generation; nothing when none is free.
  std::optional<SlotLease> acquire();
  // Memory of a slot that is filling, for its owner to write.
  std::span<std::byte> bytes(SlotLease lease);
  // Filling -> free: nothing was delivered after all.
  void cancel(SlotLease lease);
  // Filling -> delivered to `client`, a number of the caller's choice.
  void deliver(SlotLease lease, uint64_t client);
  // Delivered -> free, as the client asked.
  // Errors: not_found for a slot number out of range; failed_precondition where that generation of
  // the slot is not, or no longer, in this client's hands.
  void release(SlotLease lease, uint64_t client);

  // Delivered to `client` -> free, all of them; returns what was freed, by slot.
  std::vector<SlotLease> release_all(uint64_t client);
  // Delivered to `client` -> filling, generation and bytes kept, to be delivered again; returns
  // them by slot.
  std::vector<SlotLease> recall_all(uint64_t client);

  // Gives a slot that is not delivered fresh memory, with the same bytes if it is filling. For a
  // slot whose last client went without a release and may still have the old segment mapped.
  // Errors: those of SealedSegment::create(); the slot then keeps its old segment.
  void replace(int32_t slot);
  // Counts the segments a slot has had, from 1. A client that got the descriptors while it was
  // lower has other memory under this slot's number.
  uint64_t segment_serial(int32_t slot) const;
  // Descriptor of a slot's present segment.
  int fd(int32_t slot) const;

 private:
  struct Slot {
    SealedSegment segment;
    SlotState state = SlotState::kFree;
    uint64_t generation = 0;
    uint64_t client = 0;  // where delivered
    uint64_t segment_serial = 1;
  };

  Slot& slot_at(int32_t slot);
  const Slot& slot_at(int32_t slot) const;
  Slot& filling(SlotLease lease);
  std::vector<SlotLease> take_all(uint64_t client, SlotState next);

  int64_t slot_bytes_;
  std::vector<Slot> slots_;
};

}  // namespace rollpack::bridge
