// Memory for a batch, and a batch written into it and read back.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "tests/trainer_bridge/layout/batch_reader.h"
#include "trainer_bridge/layout/batch_layout.h"

namespace rollpack::bridge::testing {

inline constexpr std::byte kDirt{0xAB};  // what a slot holds before

// Aligned as a slot is, full of dirt.
class TestSlot {
 public:
  explicit TestSlot(size_t size)
      : memory_(static_cast<std::byte*>(std::aligned_alloc(64, (size + 63) / 64 * 64)), &std::free),
        bytes_(memory_.get(), size) {
    std::fill(bytes_.begin(), bytes_.end(), kDirt);
  }
  std::span<std::byte> bytes() { return bytes_; }

 private:
  std::unique_ptr<std::byte, decltype(&std::free)> memory_;
  std::span<std::byte> bytes_;
};

struct WrittenBatch {
  std::vector<std::byte> bytes;
  uint32_t crc32 = 0;
};

// Writes into a slot that is `spare` bytes larger than batch_bytes() promises, and checks that the
// promise is exact and the spare bytes stay as they were.
inline WrittenBatch write_batch(const BatchLayout& layout, std::span<const Sample* const> samples,
                                uint64_t batch_seq = 1, uint64_t generation = 1,
                                size_t spare = 100) {
  const auto promised = static_cast<size_t>(layout.batch_bytes(samples));
  TestSlot slot(promised + spare);
  WrittenBatch written;
  const int64_t bytes = layout.write(samples, batch_seq, generation, slot.bytes(), written.crc32);
  EXPECT_EQ(static_cast<size_t>(bytes), promised);
  const std::span<std::byte> behind = slot.bytes().subspan(promised);
  EXPECT_TRUE(std::all_of(behind.begin(), behind.end(), [](std::byte b) { return b == kDirt; }));
  written.bytes.assign(slot.bytes().begin(), slot.bytes().begin() + bytes);
  return written;
}

inline ReadBatch write_and_read(const LayoutOptions& options,
                                std::span<const Sample* const> samples) {
  return read_batch(write_batch(*make_layout(options), samples).bytes);
}

}  // namespace rollpack::bridge::testing
