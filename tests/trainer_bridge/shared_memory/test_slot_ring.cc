// A slot's way through its states, and every step out of turn.
#include "trainer_bridge/shared_memory/slot_ring.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cstring>
#include <set>
#include <string>

#include "tests/error_text.h"
#include "tests/trainer_bridge/shared_memory/peer_file.h"

namespace rollpack::bridge {
namespace {

using rollpack::testing::error_text;
using testing::PeerFile;

constexpr uint64_t kClient = 31;
constexpr uint64_t kOther = 32;

SlotLease delivered(SlotRing& ring, uint64_t client) {
  const std::optional<SlotLease> lease = ring.acquire();
  EXPECT_TRUE(lease.has_value());
  ring.deliver(*lease, client);
  return *lease;
}

TEST(SlotRing, HandsOutEverySlotOnceAndCountsGenerationsByTheSlot) {
  SlotRing ring(3, 4096);
  EXPECT_EQ(ring.num_slots(), 3);
  EXPECT_EQ(ring.slot_bytes(), 4096);
  EXPECT_EQ(ring.acquire(), (SlotLease{0, 1}));
  EXPECT_EQ(ring.acquire(), (SlotLease{1, 1}));
  EXPECT_EQ(ring.acquire(), (SlotLease{2, 1}));
  EXPECT_EQ(ring.num_free(), 0);
  EXPECT_EQ(ring.acquire(), std::nullopt);
  ring.deliver({1, 1}, kClient);
  EXPECT_EQ(ring.acquire(), std::nullopt);
  ring.release({1, 1}, kClient);
  EXPECT_EQ(ring.num_free(), 1);
  EXPECT_EQ(ring.acquire(), (SlotLease{1, 2}));
}

TEST(SlotRing, EachSlotIsASealedSegmentOfItsOwn) {
  SlotRing ring(3, 4096);
  std::set<ino_t> inodes;
  for (int32_t s = 0; s < 3; ++s) {
    struct stat status {};
    ASSERT_EQ(::fstat(ring.fd(s), &status), 0);
    EXPECT_EQ(status.st_size, 4096);
    EXPECT_EQ(::fcntl(ring.fd(s), F_GET_SEALS) & kOwnerSeals, kOwnerSeals);
    inodes.insert(status.st_ino);
    EXPECT_EQ(ring.segment_serial(s), 1u);
  }
  EXPECT_EQ(inodes.size(), 3u);
}

TEST(SlotRing, CancelFreesASlotThatWasNotDelivered) {
  SlotRing ring(1, 4096);
  ring.cancel(*ring.acquire());
  EXPECT_EQ(ring.num_free(), 1);
  EXPECT_EQ(ring.acquire(), (SlotLease{0, 2}));
}

TEST(SlotRing, ReleaseOfAnUnknownSlotNamesTheRange) {
  SlotRing ring(2, 4096);
  for (const int32_t slot : {-1, 2, 2147483647}) {
    EXPECT_EQ(error_text([&] {
                ring.release({slot, 1}, kClient);
              }),
              "not_found: slot = " + std::to_string(slot) + " (release): expected 0 to 1");
  }
}

TEST(SlotRing, ReleaseOfASlotThatIsNotTheClientsIsRefusedInEveryState) {
  SlotRing ring(1, 4096);
  const std::string refused =
      "failed_precondition: slot = 0 (release): expected a slot that was delivered to this client; "
      "it was released already, or never delivered";
  EXPECT_EQ(error_text([&] { ring.release({0, 0}, kClient); }), refused);
  const SlotLease lease = *ring.acquire();
  EXPECT_EQ(error_text([&] { ring.release(lease, kClient); }), refused);
  ring.deliver(lease, kOther);
  EXPECT_EQ(error_text([&] { ring.release(lease, kClient); }), refused);
  ring.release(lease, kOther);
  EXPECT_EQ(error_text([&] { ring.release(lease, kOther); }), refused);
  EXPECT_EQ(ring.num_free(), 1);
}

TEST(SlotRing, ReleaseOfAnotherGenerationNamesBoth) {
  SlotRing ring(1, 4096);
  ring.release(delivered(ring, kClient), kClient);
  const SlotLease second = delivered(ring, kClient);
  for (const uint64_t generation : {uint64_t{1}, uint64_t{3}}) {
    EXPECT_EQ(error_text([&] {
                ring.release({0, generation}, kClient);
              }),
              "failed_precondition: generation = " + std::to_string(generation) +
                  " (release of slot 0): expected 2; the slot holds another batch by now");
  }
  ring.release(second, kClient);
}

TEST(SlotRing, OwnersStepsOutOfTurnAreInternalErrors) {
  SlotRing ring(2, 4096);
  const std::string not_filling = "internal: slot 0, generation 1, is not being filled";
  EXPECT_EQ(error_text([&] { ring.deliver({0, 1}, kClient); }), not_filling);
  const SlotLease lease = delivered(ring, kClient);
  EXPECT_EQ(error_text([&] { ring.deliver(lease, kClient); }), not_filling);
  EXPECT_EQ(error_text([&] { ring.bytes(lease); }), not_filling);
  EXPECT_EQ(error_text([&] { ring.cancel(lease); }), not_filling);
  EXPECT_EQ(error_text([&] { ring.replace(0); }),
            "internal: slot 0 is replaced while it is delivered");
  EXPECT_EQ(error_text([&] { ring.fd(2); }), "internal: slot 2 of 2");
  EXPECT_EQ(error_text([&] { ring.cancel({-1, 1}); }), "internal: slot -1 of 2");
}

TEST(SlotRing, ReleaseAllFreesOneClientsSlotsOnly) {
  SlotRing ring(4, 4096);
  const SlotLease first = delivered(ring, kClient);
  const SlotLease others = delivered(ring, kOther);
  const SlotLease third = delivered(ring, kClient);
  const SlotLease filling = *ring.acquire();
  EXPECT_EQ(ring.release_all(kClient), (std::vector<SlotLease>{first, third}));
  EXPECT_EQ(ring.num_free(), 2);
  EXPECT_EQ(ring.release_all(kClient), std::vector<SlotLease>{});
  ring.release(others, kOther);
  ring.cancel(filling);
  EXPECT_EQ(ring.num_free(), 4);
}

TEST(SlotRing, RecalledSlotsKeepGenerationAndBytesForTheNextClient) {
  SlotRing ring(2, 4096);
  const SlotLease lease = *ring.acquire();
  std::memset(ring.bytes(lease).data(), 6, 4096);
  ring.deliver(lease, kClient);
  EXPECT_EQ(ring.recall_all(kOther), std::vector<SlotLease>{});
  EXPECT_EQ(ring.recall_all(kClient), std::vector<SlotLease>{lease});
  EXPECT_EQ(ring.num_free(), 1);
  EXPECT_EQ(ring.bytes(lease)[4095], std::byte{6});
  ring.deliver(lease, kOther);
  EXPECT_EQ(error_text([&] { ring.release(lease, kClient); }).rfind("failed_precondition", 0), 0u);
  ring.release(lease, kOther);
  EXPECT_EQ(ring.num_free(), 2);
}

TEST(SlotRing, ReplaceLeavesTheOldMemoryToWhoMapsIt) {
  SlotRing ring(1, 4096);
  const SlotLease lease = *ring.acquire();
  ring.bytes(lease)[0] = std::byte{1};
  const PeerFile reader(::dup(ring.fd(0)));
  auto* old = static_cast<std::byte*>(
      ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, reader.fd(), 0));
  ASSERT_NE(static_cast<void*>(old), MAP_FAILED);
  ring.replace(0);
  EXPECT_EQ(ring.segment_serial(0), 2u);
  EXPECT_EQ(ring.bytes(lease)[0], std::byte{1}) << "a slot that is filling keeps its bytes";
  ring.bytes(lease)[0] = std::byte{2};
  EXPECT_EQ(old[0], std::byte{1});
  ::munmap(old, 4096);

  ring.cancel(lease);
  ring.replace(0);
  EXPECT_EQ(ring.segment_serial(0), 3u);
  const SlotLease next = *ring.acquire();
  EXPECT_EQ(next, (SlotLease{0, 2}));
  EXPECT_EQ(ring.bytes(next)[0], std::byte{0});
}

TEST(SlotRing, OptionsOutOfRangeNameTheirKey) {
  EXPECT_EQ(error_text([] { SlotRing(0, 4096); }),
            "invalid_argument: bridge.slots = 0: expected 1 or more");
  EXPECT_EQ(error_text([] { SlotRing(1, 0); }),
            "invalid_argument: bridge.slot_bytes = 0: expected 1 or more");
}

}  // namespace
}  // namespace rollpack::bridge
