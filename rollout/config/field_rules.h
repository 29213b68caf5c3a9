// What a field may hold. A rule reads a value from YAML, says what is allowed, and prints it back;
// config.h names one rule a field, so a new kind of value is one more struct here.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/error.h"

namespace rollpack::rollout {

struct YamlNode;

// Why a value was not taken; what is allowed is said by the rule.
struct Refusal {
  ErrorCode code = ErrorCode::kInvalidArgument;
  std::string advice;
};

// Every rule has
//   read     sets `value`, or leaves it and says why not
//   allowed  completes "expected ..."
//   yaml     text that read() takes back as the same value
//   json     the same value as JSON

// An integer from min to max.
struct Between {
  int64_t min = 0, max = 0;
  std::optional<Refusal> read(const YamlNode& node, int32_t& value) const;
  std::string allowed() const;
  std::string yaml(int32_t value) const { return std::to_string(value); }
  std::string json(int32_t value) const { return std::to_string(value); }
};

// Any unsigned 64-bit integer.
struct Seed {
  std::optional<Refusal> read(const YamlNode& node, uint64_t& value) const;
  std::string allowed() const { return "an integer from 0 to 18446744073709551615"; }
  std::string yaml(uint64_t value) const { return std::to_string(value); }
  std::string json(uint64_t value) const { return std::to_string(value); }
};

// A positive integer, or -1, 0 or null for off; off is kept as -1.
struct TopK {
  std::optional<Refusal> read(const YamlNode& node, int32_t& value) const;
  std::string allowed() const { return "a positive integer, or -1, 0 or null for off"; }
  std::string yaml(int32_t value) const { return std::to_string(value); }
  std::string json(int32_t value) const { return std::to_string(value); }
};

// A real number from min to max; min itself only where is_min_allowed.
struct Real {
  double min = 0, max = 1;
  bool is_min_allowed = true;
  std::optional<Refusal> read(const YamlNode& node, double& value) const;
  std::string allowed() const;
  std::string yaml(double value) const;
  std::string json(double value) const { return yaml(value); }
};

struct Temperature {
  std::optional<Refusal> read(const YamlNode& node, double& value) const;
  std::string allowed() const;
  std::string yaml(double value) const { return Real{}.yaml(value); }
  std::string json(double value) const { return Real{}.yaml(value); }
};

// Bytes with a unit: 64MiB, 2GiB, 1.5GB or a plain number.
struct Bytes {
  int64_t min = 0, max = 0;
  std::optional<Refusal> read(const YamlNode& node, int64_t& value) const;
  std::string allowed() const;
  std::string yaml(int64_t value) const;
  std::string json(int64_t value) const { return std::to_string(value); }
};

struct Flag {
  std::optional<Refusal> read(const YamlNode& node, bool& value) const;
  std::string allowed() const { return "true or false"; }
  std::string yaml(bool value) const { return value ? "true" : "false"; }
  std::string json(bool value) const { return yaml(value); }
};

// One line of text, not empty.
struct Text {
  size_t max_bytes = 4096;
  size_t min_bytes = 1;  // 0: "" says that there is none
  std::optional<Refusal> read(const YamlNode& node, std::string& value) const;
  std::string allowed() const;
  std::string yaml(const std::string& value) const;
  std::string json(const std::string& value) const;
};

// One of a few words. `not_built` are words that users know from elsewhere: refused by name.
struct OneOf {
  std::vector<std::string_view> choices;
  std::optional<Refusal> read(const YamlNode& node, std::string& value) const;
  std::string allowed() const;
  std::string yaml(const std::string& value) const { return Text{}.yaml(value); }
  std::string json(const std::string& value) const { return Text{}.json(value); }
};

// bfloat16 or float32; the narrower formats that others compute in are refused with the reason.
struct ComputeDType {
  std::optional<Refusal> read(const YamlNode& node, std::string& value) const;
  std::string allowed() const;
  std::string yaml(const std::string& value) const { return value; }
  std::string json(const std::string& value) const { return Text{}.json(value); }
};

// A list of some of a few words, each once.
struct SubsetOf {
  std::vector<std::string_view> choices;
  std::optional<Refusal> read(const YamlNode& node, std::vector<std::string>& value) const;
  std::string allowed() const;
  std::string yaml(const std::vector<std::string>& value) const;
  std::string json(const std::vector<std::string>& value) const;
};

// A list of token ids.
struct TokenIds {
  size_t max_ids = 1024;
  std::optional<Refusal> read(const YamlNode& node, std::vector<int32_t>& value) const;
  std::string allowed() const;
  std::string yaml(const std::vector<int32_t>& value) const;
  std::string json(const std::vector<int32_t>& value) const { return yaml(value); }
};

}  // namespace rollpack::rollout
