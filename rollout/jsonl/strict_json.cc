#include "rollout/jsonl/strict_json.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <utility>

#include "kernels/base/error.h"
#include "rollout/jsonl/text_file.h"

namespace rollpack::rollout {
namespace {

constexpr size_t kMaxShownBytes = 60;

// Cut at a character's boundary, so that an error is valid UTF-8 wherever its value was.
std::string cut(std::string text, size_t max_bytes) {
  if (text.size() <= max_bytes) return text;
  while (max_bytes > 0 && (static_cast<uint8_t>(text[max_bytes]) & 0xC0) == 0x80) --max_bytes;
  return text.substr(0, max_bytes) + "...";
}

// nlohmann's texts read "[json.exception.parse_error.101] parse error at line 1, column 2: syntax
// error while ..."; place and number are ours to say.
std::string parser_message(const char* what) {
  std::string text = what;
  if (const size_t bracket = text.find("] "); text.front() == '[' && bracket != std::string::npos) {
    text.erase(0, bracket + 2);
  }
  if (const size_t syntax = text.find("syntax error"); syntax != std::string::npos) {
    text.erase(0, syntax);
  }
  return cut(text, 200);
}

// Position in bytes -> origin of an error.
using OriginAt = std::function<std::string(size_t)>;

class StrictBuilder : public nlohmann::json_sax<Json> {
 public:
  StrictBuilder(std::string origin, OriginAt origin_at, int max_depth)
      : origin_(std::move(origin)), origin_at_(std::move(origin_at)), max_depth_(max_depth) {}

  Json take() { return std::move(root_); }

  bool null() override { return add(nullptr) != nullptr; }
  bool boolean(bool value) override { return add(value) != nullptr; }
  bool number_integer(number_integer_t value) override { return add(value) != nullptr; }
  bool number_unsigned(number_unsigned_t value) override { return add(value) != nullptr; }
  bool number_float(number_float_t value, const string_t& text) override {
    // An integer that fits neither int64 nor uint64 arrives here, already rounded.
    if (text.find_first_of(".eE") == string_t::npos) {
      fail(path(), cut(text, kMaxShownBytes), "an integer of at most 64 bits", {});
    }
    return add(value) != nullptr;
  }
  bool string(string_t& value) override { return add(std::move(value)) != nullptr; }
  bool binary(binary_t&) override { return false; }

  bool start_object(size_t) override { return open(Json::object()); }
  bool key(string_t& name) override {
    if (open_.back()->contains(name)) {
      fail(cut(name, kMaxShownBytes), {}, "each key once", "this key is repeated in its object");
    }
    key_ = std::move(name);
    return true;
  }
  bool end_object() override { return close(); }
  bool start_array(size_t) override { return open(Json::array()); }
  bool end_array() override { return close(); }

  bool parse_error(size_t position, const std::string&, const Json::exception& error) override {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .origin = origin_at_(position),
                 .allowed = "valid JSON",
                 .message = parser_message(error.what())});
  }

 private:
  Json* add(Json value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    Json& parent = *open_.back();
    if (parent.is_array()) return &parent.emplace_back(std::move(value));
    return &(parent[key_] = std::move(value));
  }
  // Pointers into arrays stay good: only the innermost open one grows.
  bool open(Json container) {
    if (static_cast<int>(open_.size()) >= max_depth_) {
      fail({}, {}, fmt::format("JSON of at most {} nested objects and arrays", max_depth_), {});
    }
    open_.push_back(add(std::move(container)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }
  std::string path() const { return cut(key_, kMaxShownBytes); }

  [[noreturn]] void fail(std::string field, std::string value, std::string allowed,
                         std::string message) const {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = std::move(field),
                 .value = std::move(value),
                 .origin = origin_,
                 .allowed = std::move(allowed),
                 .message = std::move(message)});
  }

  std::string origin_;
  OriginAt origin_at_;
  int max_depth_;
  Json root_;
  std::vector<Json*> open_;
  std::string key_;
};

Json parse(std::string_view text, const std::string& origin, const OriginAt& origin_at,
           const JsonLimits& limits) {
  const auto refuse = [&](size_t position, std::string allowed, std::string message) {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .origin = origin_at(position),
                 .allowed = std::move(allowed),
                 .message = std::move(message)});
  };
  if (text.size() > limits.max_bytes) {
    refuse(0, fmt::format("JSON of at most {} bytes", limits.max_bytes),
           fmt::format("this has {}", text.size()));
  }
  // The parser would skip a byte-order mark and take a NUL for the end of its input.
  if (text.starts_with("\xEF\xBB\xBF")) {
    refuse(0, "JSON without a byte-order mark", "save it as plain UTF-8");
  }
  if (const size_t nul = text.find('\0'); nul != std::string_view::npos) {
    refuse(nul, "valid JSON", fmt::format("byte {} is NUL", nul));
  }
  StrictBuilder builder(origin, origin_at, limits.max_depth);
  Json::sax_parse(text.begin(), text.end(), &builder);
  return builder.take();
}

std::string integers_between(int64_t min, int64_t max) {
  constexpr int64_t kLowest = std::numeric_limits<int64_t>::min();
  constexpr int64_t kHighest = std::numeric_limits<int64_t>::max();
  if (min == kLowest && max == kHighest) return "an integer";
  if (max == kHighest) return fmt::format("an integer of at least {}", min);
  return fmt::format("an integer from {} to {}", min, max);
}

// nlohmann holds non-negative integers as unsigned, negative ones as signed.
bool fits(const Json& value, int64_t min, int64_t max) {
  if (value.is_number_unsigned()) {
    return std::in_range<int64_t>(value.get<uint64_t>()) && value.get<int64_t>() >= min &&
           value.get<int64_t>() <= max;
  }
  return value.is_number_integer() && value.get<int64_t>() >= min && value.get<int64_t>() <= max;
}

}  // namespace

Json parse_json(std::string_view text, const std::string& origin, const JsonLimits& limits) {
  return parse(
      text, origin, [&](size_t) { return origin; }, limits);
}

Json read_json_file(const std::string& path, const JsonLimits& limits) {
  const std::string text = read_text_file(path, "file", static_cast<int64_t>(limits.max_bytes));
  const auto origin_at = [&](size_t position) {
    const auto end = text.begin() + static_cast<ptrdiff_t>(std::min(position, text.size()));
    return fmt::format("{}:{}", path, 1 + std::count(text.begin(), end, '\n'));
  };
  return parse(text, path, origin_at, limits);
}

std::string brief_json(const Json& value) {
  return cut(value.dump(-1, ' ', false, Json::error_handler_t::replace), kMaxShownBytes);
}

void fail_json(const Json& value, const JsonPlace& place, std::string allowed,
               std::string message) {
  throw Error({.code = ErrorCode::kInvalidArgument,
               .field = place.field,
               .value = brief_json(value),
               .origin = place.origin,
               .allowed = std::move(allowed),
               .message = std::move(message)});
}

int64_t json_integer(const Json& value, const JsonPlace& place, int64_t min, int64_t max) {
  if (!fits(value, min, max)) fail_json(value, place, integers_between(min, max));
  return value.get<int64_t>();
}

uint64_t json_unsigned(const Json& value, const JsonPlace& place) {
  if (!value.is_number_unsigned()) fail_json(value, place, "an integer from 0 to 2^64 - 1");
  return value.get<uint64_t>();
}

double json_number(const Json& value, const JsonPlace& place) {
  if (!value.is_number()) fail_json(value, place, "a number");
  return value.get<double>();
}

bool json_bool(const Json& value, const JsonPlace& place) {
  if (!value.is_boolean()) fail_json(value, place, "true or false");
  return value.get<bool>();
}

std::string json_string(const Json& value, const JsonPlace& place) {
  if (!value.is_string()) fail_json(value, place, "a string");
  return value.get<std::string>();
}

const Json& json_object(const Json& value, const JsonPlace& place) {
  if (!value.is_object()) fail_json(value, place, "a JSON object");
  return value;
}

const Json& json_array(const Json& value, const JsonPlace& place) {
  if (!value.is_array()) fail_json(value, place, "a list");
  return value;
}

std::vector<int32_t> json_int32_list(const Json& value, const JsonPlace& place, int32_t min,
                                     int32_t max) {
  if (!value.is_array()) fail_json(value, place, "a list of integers");
  std::vector<int32_t> list;
  list.reserve(value.size());
  for (const Json& entry : value) {
    if (!fits(entry, min, max)) {
      fail_json(entry, {fmt::format("{}[{}]", place.field, list.size()), place.origin},
                integers_between(min, max));
    }
    list.push_back(entry.get<int32_t>());
  }
  return list;
}

}  // namespace rollpack::rollout
