// JSON that strangers wrote, read strictly: no repeated keys, no number that does not fit, no NUL
// or byte-order mark, bounded size and depth. nlohmann alone keeps the last of repeated keys, turns
// integers above 2^64 into floats and narrows silently; its SAX interface lets us refuse all that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace rollpack::rollout {

using Json = nlohmann::json;

struct JsonLimits {
  size_t max_bytes = size_t{1} << 20;
  int max_depth = 16;  // open objects and arrays
};

// Parses `text` wholly. `origin` ("prompts.jsonl:3") is used in errors as it is.
// Errors: invalid_argument naming what is wrong and where.
Json parse_json(std::string_view text, const std::string& origin, const JsonLimits& limits);

// The same of a regular file; errors say "path:line" where the parser knows the line.
Json read_json_file(const std::string& path, const JsonLimits& limits);

// Where a value stands, for errors.
struct JsonPlace {
  std::string field;   // "sampling.top_k"
  std::string origin;  // "prompts.jsonl:3"
};

// Typed values; an error (invalid_argument) names place, value and what is allowed. Integers are
// JSON integers: 8.0 and "8" are not.
int64_t json_integer(const Json& value, const JsonPlace& place,
                     int64_t min = std::numeric_limits<int64_t>::min(),
                     int64_t max = std::numeric_limits<int64_t>::max());
uint64_t json_unsigned(const Json& value, const JsonPlace& place);
double json_number(const Json& value, const JsonPlace& place);
bool json_bool(const Json& value, const JsonPlace& place);
std::string json_string(const Json& value, const JsonPlace& place);
const Json& json_object(const Json& value, const JsonPlace& place);
const Json& json_array(const Json& value, const JsonPlace& place);
// A list of integers from `min` to `max`; an error names the entry, "input_ids[7]".
std::vector<int32_t> json_int32_list(const Json& value, const JsonPlace& place, int32_t min,
                                     int32_t max);

// The value as text for an error, cut at 60 bytes.
std::string brief_json(const Json& value);

// Throws invalid_argument for `value` at `place`.
[[noreturn]] void fail_json(const Json& value, const JsonPlace& place, std::string allowed,
                            std::string message = {});

}  // namespace rollpack::rollout
