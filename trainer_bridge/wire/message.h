// Messages: one MessagePack map a frame, decoded only after scan_message() has passed it; errors
// and number arrays as maps and bin.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <vector>

#include "kernels/base/error.h"

namespace rollpack::bridge {

using Json = nlohmann::json;

// Errors: those of scan_message().
Json decode_message(std::span<const uint8_t> bytes);

// Errors: resource_exhausted when the map does not fit a frame.
std::vector<uint8_t> encode_message(const Json& map);

// {code, field, value, origin, allowed, message}, all text. Text that is not UTF-8 (a value quoted
// from elsewhere) is replaced by '?' byte by byte, so that a report always arrives.
Json error_to_map(const ErrorInfo& info);
// Errors: invalid_argument for a map that error_to_map() does not make.
ErrorInfo error_from_map(const Json& map);

// Little-endian bin of numbers; the machine must be little-endian, which is checked at build time.
Json to_bin(std::span<const int32_t> values);
Json to_bin(std::span<const float> values);

}  // namespace rollpack::bridge
