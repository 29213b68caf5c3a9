// Makes the bytes of a .safetensors file from a header's text, right or wrong.
#pragma once

#include <cstdint>
#include <string>

namespace rollpack::testing {

inline std::string header_size_bytes(uint64_t size) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(size >> (8 * i) & 0xff);
  return bytes;
}

// Data byte i is i.
inline std::string safetensors_bytes(const std::string& header, size_t data_bytes) {
  std::string bytes = header_size_bytes(header.size()) + header;
  for (size_t i = 0; i < data_bytes; ++i) bytes += static_cast<char>(i);
  return bytes;
}

}  // namespace rollpack::testing
