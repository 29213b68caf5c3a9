#include "trainer_bridge/shared_memory/slot_ring.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <utility>

#include "kernels/base/error.h"

namespace rollpack::bridge {
namespace {

SealedSegment create_segment(int32_t slot, int64_t bytes) {
  return SealedSegment::create(fmt::format("rollpack-slot-{}", slot), bytes);
}

void check_at_least_one(const char* field, int64_t value) {
  if (value >= 1) return;
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = field,
               .value = std::to_string(value),
               .allowed = "1 or more"});
}

}  // namespace

SlotRing::SlotRing(int32_t num_slots, int64_t slot_bytes) : slot_bytes_(slot_bytes) {
  check_at_least_one("bridge.slots", num_slots);
  check_at_least_one("bridge.slot_bytes", slot_bytes);
  slots_.reserve(num_slots);
  for (int32_t s = 0; s < num_slots; ++s) {
    slots_.push_back({.segment = create_segment(s, slot_bytes)});
  }
}

int32_t SlotRing::num_free() const {
  return static_cast<int32_t>(std::count_if(slots_.begin(), slots_.end(), [](const Slot& slot) {
    return slot.state == SlotState::kFree;
  }));
}

std::optional<SlotLease> SlotRing::acquire() {
  for (size_t s = 0; s < slots_.size(); ++s) {
    if (slots_[s].state != SlotState::kFree) continue;
    slots_[s].state = SlotState::kFilling;
    return SlotLease{static_cast<int32_t>(s), ++slots_[s].generation};
  }
  return std::nullopt;
}

std::span<std::byte> SlotRing::bytes(SlotLease lease) {
  return filling(lease).segment.bytes();
}

void SlotRing::cancel(SlotLease lease) {
  filling(lease).state = SlotState::kFree;
}

void SlotRing::deliver(SlotLease lease, uint64_t client) {
  Slot& slot = filling(lease);
  slot.state = SlotState::kDelivered;
  slot.client = client;
}

void SlotRing::release(SlotLease lease, uint64_t client) {
  if (lease.slot < 0 || lease.slot >= num_slots()) {
    throw Error({.code = ErrorCode::kNotFound,
                 .field = "slot",
                 .value = std::to_string(lease.slot),
                 .origin = "release",
                 .allowed = fmt::format("0 to {}", num_slots() - 1)});
  }
  Slot& slot = slots_[lease.slot];
  if (slot.state != SlotState::kDelivered || slot.client != client) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "slot",
                 .value = std::to_string(lease.slot),
                 .origin = "release",
                 .allowed = "a slot that was delivered to this client",
                 .message = "it was released already, or never delivered"});
  }
  if (slot.generation != lease.generation) {
    throw Error({.code = ErrorCode::kFailedPrecondition,
                 .field = "generation",
                 .value = std::to_string(lease.generation),
                 .origin = fmt::format("release of slot {}", lease.slot),
                 .allowed = std::to_string(slot.generation),
                 .message = "the slot holds another batch by now"});
  }
  slot.state = SlotState::kFree;
}

std::vector<SlotLease> SlotRing::release_all(uint64_t client) {
  return take_all(client, SlotState::kFree);
}

std::vector<SlotLease> SlotRing::recall_all(uint64_t client) {
  return take_all(client, SlotState::kFilling);
}

void SlotRing::replace(int32_t s) {
  Slot& slot = slot_at(s);
  if (slot.state == SlotState::kDelivered) {
    fail_invariant(fmt::format("slot {} is replaced while it is delivered", s));
  }
  SealedSegment fresh = create_segment(s, slot_bytes_);
  if (slot.state == SlotState::kFilling) {
    const std::span<const std::byte> old = slot.segment.bytes();
    std::copy(old.begin(), old.end(), fresh.bytes().begin());
  }
  slot.segment = std::move(fresh);
  ++slot.segment_serial;
}

uint64_t SlotRing::segment_serial(int32_t slot) const {
  return slot_at(slot).segment_serial;
}

int SlotRing::fd(int32_t slot) const {
  return slot_at(slot).segment.fd();
}

const SlotRing::Slot& SlotRing::slot_at(int32_t slot) const {
  if (slot < 0 || slot >= num_slots()) {
    fail_invariant(fmt::format("slot {} of {}", slot, num_slots()));
  }
  return slots_[slot];
}

SlotRing::Slot& SlotRing::slot_at(int32_t slot) {
  return const_cast<Slot&>(std::as_const(*this).slot_at(slot));
}

SlotRing::Slot& SlotRing::filling(SlotLease lease) {
  Slot& slot = slot_at(lease.slot);
  if (slot.state != SlotState::kFilling || slot.generation != lease.generation) {
    fail_invariant(
        fmt::format("slot {}, generation {}, is not being filled", lease.slot, lease.generation));
  }
  return slot;
}

std::vector<SlotLease> SlotRing::take_all(uint64_t client, SlotState next) {
  std::vector<SlotLease> leases;
  for (size_t s = 0; s < slots_.size(); ++s) {
    if (slots_[s].state != SlotState::kDelivered || slots_[s].client != client) continue;
    slots_[s].state = next;
    leases.push_back({static_cast<int32_t>(s), slots_[s].generation});
  }
  return leases;
}

}  // namespace rollpack::bridge
