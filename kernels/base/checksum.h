// Checksums and hashes that cross files and processes: fixed by format, never by platform.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace rollpack {

// CRC-32 as zlib has it (polynomial 0xEDB88320), continued from `seed`.
uint32_t crc32_of(std::span<const std::byte> bytes, uint32_t seed = 0);

// A 64-bit hash for telling large memory apart within a build, at 15 GB/s: neither its value nor
// resistance to whoever looks for collisions is promised.
uint64_t hash64(std::span<const std::byte> bytes, uint64_t seed = 0);

// FNV-1a, 64 bits. Source: Fowler, Noll, Vo; offset basis 14695981039346656037.
constexpr uint64_t fnv1a64(std::string_view text) {
  uint64_t hash = 14695981039346656037ull;
  for (const char c : text) {
    hash ^= static_cast<uint8_t>(c);
    hash *= 1099511628211ull;
  }
  return hash;
}

}  // namespace rollpack
