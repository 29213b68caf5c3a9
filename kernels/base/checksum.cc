#include "kernels/base/checksum.h"

#include <isa-l/crc.h>

#include <bit>
#include <cstring>

namespace rollpack {

uint32_t crc32_of(std::span<const std::byte> bytes, uint32_t seed) {
  return ::crc32_gzip_refl(seed, reinterpret_cast<const unsigned char*>(bytes.data()),
                           bytes.size());
}

// Four independent multiply-xor lanes over 32-byte groups, so that the multiplications overlap; the
// last group is filled up with zeros, and the length is hashed as well. The mixing constants are
// the 64-bit primes of xxHash (public domain).
uint64_t hash64(std::span<const std::byte> bytes, uint64_t seed) {
  constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87ull;
  constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Full;
  uint64_t lanes[4] = {seed + kPrime1, seed ^ kPrime2, seed, seed - kPrime1};
  const auto mix = [&lanes](const std::byte* group) {
    uint64_t words[4];
    std::memcpy(words, group, sizeof words);
    for (int lane = 0; lane < 4; ++lane) {
      lanes[lane] = std::rotl(lanes[lane] + words[lane] * kPrime2, 31) * kPrime1;
    }
  };
  size_t i = 0;
  for (; i + 32 <= bytes.size(); i += 32) mix(bytes.data() + i);
  if (i < bytes.size()) {
    std::byte group[32] = {};
    std::memcpy(group, bytes.data() + i, bytes.size() - i);
    mix(group);
  }
  uint64_t hash = std::rotl(lanes[0], 1) + std::rotl(lanes[1], 7) + std::rotl(lanes[2], 12) +
                  std::rotl(lanes[3], 18) + bytes.size();
  hash = (hash ^ (hash >> 33)) * kPrime2;
  return hash ^ (hash >> 29);
}

}  // namespace rollpack
