#include "kernels/base/checksum.h"

#include <zlib.h>

namespace rollpack {

uint32_t crc32_of(std::span<const std::byte> bytes, uint32_t seed) {
  return static_cast<uint32_t>(
      ::crc32_z(seed, reinterpret_cast<const Bytef*>(bytes.data()), bytes.size()));
}

}  // namespace rollpack
