#include "trainer_bridge/wire/fields.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "trainer_bridge/wire/utf8.h"

namespace rollpack::bridge {
namespace {

// Edits (insert, delete, replace) from a to b; keys are short.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j < row.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row.back();
}

}  // namespace

bool is_integer_in(const Json& value, int64_t low, int64_t high) {
  if (value.is_number_unsigned()) {
    const auto number = value.get<uint64_t>();
    return number <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) &&
           static_cast<int64_t>(number) >= low && static_cast<int64_t>(number) <= high;
  }
  if (!value.is_number_integer()) return false;
  return value.get<int64_t>() >= low && value.get<int64_t>() <= high;
}

std::string quoted(const Json& value) {
  if (value.is_string())
    return fmt::format("\"{}\"", shortened(value.get_ref<const std::string&>()));
  if (value.is_binary()) return fmt::format("{} bytes of bin", value.get_binary().size());
  if (value.is_array()) return fmt::format("an array of {}", value.size());
  if (value.is_object()) return fmt::format("a map of {}", value.size());
  if (value.is_null()) return "nil";
  return value.dump();
}

Fields::Fields(const Json& map, std::string path, std::string origin)
    : map_(map), path_(std::move(path)), origin_(std::move(origin)) {
  if (!map_.is_object()) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = path_,
                 .value = quoted(map_),
                 .origin = origin_,
                 .allowed = "a map"});
  }
}

std::string Fields::path_of(std::string_view key) const {
  return path_.empty() ? std::string(key) : fmt::format("{}.{}", path_, key);
}

void Fields::refuse(std::string_view key, const Json& value, std::string allowed) const {
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = path_of(key),
               .value = quoted(value),
               .origin = origin_,
               .allowed = std::move(allowed)});
}

const Json* Fields::optional_any(std::string_view key) {
  known_.emplace_back(key);
  const auto found = map_.find(known_.back());
  return found == map_.end() || found->is_null() ? nullptr : &*found;
}

const Json& Fields::any(std::string_view key) {
  const Json* value = optional_any(key);
  if (value != nullptr) return *value;
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = path_of(key),
               .origin = origin_,
               .message = "missing"});
}

std::optional<int64_t> Fields::optional_integer(std::string_view key, int64_t low, int64_t high) {
  const Json* value = optional_any(key);
  if (value == nullptr) return std::nullopt;
  if (!is_integer_in(*value, low, high)) {
    refuse(key, *value,
           high == std::numeric_limits<int64_t>::max()
               ? fmt::format("an integer of at least {}", low)
               : fmt::format("an integer from {} to {}", low, high));
  }
  return value->get<int64_t>();
}

int64_t Fields::integer(std::string_view key, int64_t low, int64_t high) {
  any(key);
  return *optional_integer(key, low, high);
}

std::optional<int32_t> Fields::optional_i32(std::string_view key) {
  const auto value = optional_integer(key, std::numeric_limits<int32_t>::min(),
                                      std::numeric_limits<int32_t>::max());
  return value ? std::optional(static_cast<int32_t>(*value)) : std::nullopt;
}

std::optional<uint64_t> Fields::optional_u64(std::string_view key) {
  const Json* value = optional_any(key);
  if (value == nullptr) return std::nullopt;
  const bool negative =
      value->is_number_integer() && !value->is_number_unsigned() && value->get<int64_t>() < 0;
  if (!value->is_number_integer() || negative) {
    refuse(key, *value, "an integer from 0 to 18446744073709551615");
  }
  return value->get<uint64_t>();
}

uint64_t Fields::u64(std::string_view key) {
  any(key);
  return *optional_u64(key);
}

std::optional<double> Fields::optional_number(std::string_view key) {
  const Json* value = optional_any(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number() || !std::isfinite(value->get<double>())) {
    refuse(key, *value, "a finite number");
  }
  return value->get<double>();
}

double Fields::number(std::string_view key) {
  any(key);
  return *optional_number(key);
}

std::optional<bool> Fields::optional_boolean(std::string_view key) {
  const Json* value = optional_any(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_boolean()) refuse(key, *value, "true or false");
  return value->get<bool>();
}

std::string Fields::text(std::string_view key) {
  const Json& value = any(key);
  if (!value.is_string()) refuse(key, value, "text");
  return value.get<std::string>();
}

size_t Fields::one_of(std::string_view key, std::initializer_list<std::string_view> names) {
  const Json& value = any(key);
  const auto* found =
      value.is_string() ? std::find(names.begin(), names.end(), value.get_ref<const std::string&>())
                        : names.end();
  if (found == names.end()) refuse(key, value, fmt::format("one of {}", fmt::join(names, ", ")));
  return static_cast<size_t>(found - names.begin());
}

template <class T>
std::vector<T> Fields::array_of(std::string_view key, const Json& value) const {
  if (!value.is_binary() || value.get_binary().size() % sizeof(T) != 0) {
    refuse(key, value,
           fmt::format("bin of little-endian {}, a multiple of 4 bytes",
                       std::is_same_v<T, float> ? "f32" : "i32"));
  }
  const auto& bytes = value.get_binary();
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

std::vector<int32_t> Fields::i32s(std::string_view key) {
  return array_of<int32_t>(key, any(key));
}

std::optional<std::vector<int32_t>> Fields::optional_i32s(std::string_view key) {
  const Json* value = optional_any(key);
  if (value == nullptr) return std::nullopt;
  return array_of<int32_t>(key, *value);
}

std::vector<float> Fields::f32s(std::string_view key) {
  return array_of<float>(key, any(key));
}

const Json& Fields::array(std::string_view key) {
  const Json& value = any(key);
  if (!value.is_array()) refuse(key, value, "an array");
  return value;
}

const Json* Fields::optional_map(std::string_view key) {
  const Json* value = optional_any(key);
  if (value != nullptr && !value->is_object()) refuse(key, *value, "a map");
  return value;
}

void Fields::finish() const {
  for (const auto& [key, value] : map_.items()) {
    if (std::find(known_.begin(), known_.end(), key) != known_.end()) continue;
    const std::string wrong = shortened(key);
    const auto nearest =
        std::min_element(known_.begin(), known_.end(), [&](const auto& a, const auto& b) {
          return edit_distance(a, wrong) < edit_distance(b, wrong);
        });
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = path_of(wrong),
                 .value = quoted(value),
                 .origin = origin_,
                 .allowed = fmt::format("one of {}", fmt::join(known_, ", ")),
                 .message = nearest == known_.end()
                                ? "unknown key"
                                : fmt::format("unknown key; did you mean {}?", *nearest)});
  }
}

}  // namespace rollpack::bridge
