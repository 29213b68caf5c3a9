#include "kernels/base/checksum.h"

#include <gtest/gtest.h>

#include <set>
#include <vector>

namespace rollpack {
namespace {

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

TEST(Checksum, Crc32GivesTheCheckValueOfTheCatalogue) {
  // CRC-32/ISO-HDLC of "123456789", and of nothing.
  EXPECT_EQ(crc32_of(bytes_of("123456789")), 0xCBF43926u);
  EXPECT_EQ(crc32_of(bytes_of("")), 0u);
  EXPECT_EQ(crc32_of(bytes_of("The quick brown fox jumps over the lazy dog")), 0x414FA339u);
}

TEST(Checksum, Crc32ContinuesFromItsSeed) {
  const std::string_view text = "The quick brown fox jumps over the lazy dog";
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    const uint32_t first = crc32_of(bytes_of(text.substr(0, cut)));
    EXPECT_EQ(crc32_of(bytes_of(text.substr(cut)), first), 0x414FA339u) << cut;
  }
}

TEST(Checksum, ABitOrAByteMoreChangesTheLargeHash) {
  std::set<uint64_t> hashes;
  std::vector<std::byte> bytes(100);
  for (size_t size = 0; size <= bytes.size(); ++size) {
    hashes.insert(hash64(std::span(bytes).first(size)));
  }
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= std::byte(1 << bit % 8);
    hashes.insert(hash64(bytes));
    bytes[bit / 8] ^= std::byte(1 << bit % 8);
  }
  hashes.insert(hash64(bytes, 1));
  EXPECT_EQ(hashes.size(), 101u + 800u + 1u);
  EXPECT_EQ(hash64(bytes), hash64(std::vector<std::byte>(100)));
}

TEST(Checksum, FnvGivesThePublishedVectors) {
  EXPECT_EQ(fnv1a64(""), 0xcbf29ce484222325ull);
  EXPECT_EQ(fnv1a64("a"), 0xaf63dc4c8601ec8cull);
  EXPECT_EQ(fnv1a64("foobar"), 0x85944171f73967e8ull);
}

TEST(Checksum, FnvTakesBytesAboveAsciiAsUnsigned) {
  // One step by hand: (basis xor 0xff) times the prime.
  EXPECT_EQ(fnv1a64("\xff"), (0xcbf29ce484222325ull ^ 0xffull) * 0x100000001b3ull);
}

}  // namespace
}  // namespace rollpack
