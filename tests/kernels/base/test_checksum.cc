#include "kernels/base/checksum.h"

#include <gtest/gtest.h>

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
