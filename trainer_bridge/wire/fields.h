// Typed reading of a decoded map. Every key is asked for once; finish() refuses what nobody asked
// for, so a misspelt key is an error and never a default.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "trainer_bridge/wire/message.h"

namespace rollpack::bridge {

inline constexpr int64_t kMaxI64 = std::numeric_limits<int64_t>::max();

// Readers come in pairs: `x` requires the key, `optional_x` takes an absent key or nil as nothing.
// Errors, all: invalid_argument with field "{path}.{key}", the value, the origin, what is allowed.
class Fields {
 public:
  // `map` outlives the reader. An empty path names fields by their key alone.
  Fields(const Json& map, std::string path, std::string origin);

  int64_t integer(std::string_view key, int64_t low, int64_t high);
  std::optional<int64_t> optional_integer(std::string_view key, int64_t low, int64_t high);
  std::optional<int32_t> optional_i32(std::string_view key);
  uint64_t u64(std::string_view key);
  std::optional<uint64_t> optional_u64(std::string_view key);
  // Any finite number; integers too.
  std::optional<double> optional_number(std::string_view key);
  double number(std::string_view key);
  std::optional<bool> optional_boolean(std::string_view key);
  std::string text(std::string_view key);
  // The place of the text in `names`.
  size_t one_of(std::string_view key, std::initializer_list<std::string_view> names);
  // bin, little-endian.
  std::vector<int32_t> i32s(std::string_view key);
  std::optional<std::vector<int32_t>> optional_i32s(std::string_view key);
  std::vector<float> f32s(std::string_view key);
  // An array, whose entries the caller reads.
  const Json& array(std::string_view key);
  // A map or nothing.
  const Json* optional_map(std::string_view key);
  // Any value but nil, or nothing.
  const Json* optional_any(std::string_view key);
  const Json& any(std::string_view key);

  // Refuses keys that were not read, naming the nearest one that was.
  void finish() const;

  std::string path_of(std::string_view key) const;
  [[noreturn]] void refuse(std::string_view key, const Json& value, std::string allowed) const;

 private:
  template <class T>
  std::vector<T> array_of(std::string_view key, const Json& value) const;

  const Json& map_;
  std::string path_;
  std::string origin_;
  std::vector<std::string> known_;
};

// Whether `value` is an integer of the range; nlohmann would convert silently.
bool is_integer_in(const Json& value, int64_t low, int64_t high);

// A value as an error quotes it: numbers and text as they are, larger things by kind and size.
std::string quoted(const Json& value);

}  // namespace rollpack::bridge
