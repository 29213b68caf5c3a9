#include "rollout/config/field_rules.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <limits>

#include "rollout/config/yaml_tree.h"
#include "rollout/jsonl/strict_json.h"
#include "rollout/jsonl/text_file.h"
#include "rollout/sampling/temperature.h"

namespace rollpack::rollout {
namespace {

using Kind = YamlNode::Kind;

Refusal refuse(std::string advice = {}) {
  return {.advice = std::move(advice)};
}

// Plain words that YAML 1.1 readers take for true, false or null: quoted when printed.
constexpr std::array<std::string_view, 10> kReservedWords = {"true", "false", "yes", "no",   "on",
                                                             "off",  "y",     "n",   "null", "~"};

std::string lower(std::string_view text) {
  std::string out(text);
  std::transform(out.begin(), out.end(), out.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return out;
}

bool is_reserved_word(std::string_view text) {
  return std::find(kReservedWords.begin(), kReservedWords.end(), lower(text)) !=
         kReservedWords.end();
}

bool all_digits(std::string_view text) {
  return !text.empty() &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

// What a value that is no plain scalar is missing; nothing for a plain scalar.
std::optional<Refusal> refuse_unless_plain(const YamlNode& node) {
  if (node.is_plain()) return std::nullopt;
  if (node.kind == Kind::kScalar) return refuse("remove the quotes");
  if (node.kind == Kind::kNull) return refuse("leave the key out to keep its default");
  return refuse();
}

// Decimal digits with an optional minus, and nothing that YAML 1.1 and 1.2 read differently.
template <class Int>
std::optional<Refusal> read_integer(const YamlNode& node, Int& value) {
  if (auto refusal = refuse_unless_plain(node)) return refusal;
  const std::string_view text = node.text;
  const std::string_view digits = text.substr(text.starts_with('-') ? 1 : 0);
  if (digits.size() > 1 && digits.front() == '0' && all_digits(digits)) {
    const size_t significant = std::min(digits.find_first_not_of('0'), digits.size() - 1);
    return refuse(fmt::format("a leading zero is octal in YAML 1.1 and decimal in 1.2: write {}",
                              digits.substr(significant)));
  }
  if (is_reserved_word(text)) return refuse("YAML 1.1 reads this word as a boolean");
  if (!all_digits(digits)) return refuse();
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return refuse("it is out of range");
  return std::nullopt;
}

// digits [. digits] [e [sign] digits], with an optional minus.
bool has_number_form(std::string_view text) {
  if (text.starts_with('-')) text.remove_prefix(1);
  const auto take_digits = [&text] {
    const size_t count = std::min(text.find_first_not_of("0123456789"), text.size());
    text.remove_prefix(count);
    return count > 0;
  };
  if (!take_digits()) return false;
  if (text.starts_with('.')) {
    text.remove_prefix(1);
    if (!take_digits()) return false;
  }
  if (text.starts_with('e') || text.starts_with('E')) {
    text.remove_prefix(1);
    if (text.starts_with('-') || text.starts_with('+')) text.remove_prefix(1);
    if (!take_digits()) return false;
  }
  return text.empty();
}

std::optional<Refusal> read_real(const YamlNode& node, double& value) {
  if (auto refusal = refuse_unless_plain(node)) return refusal;
  const std::string& text = node.text;
  const std::string word = lower(text);
  if (word.find("nan") != std::string::npos || word.find("inf") != std::string::npos) {
    return refuse("it must be finite");
  }
  if (!has_number_form(text)) return refuse();
  if (text.size() > 1 && text[0] == '0' && all_digits(text)) {
    return refuse("a leading zero is octal in YAML 1.1: remove it");
  }
  double number = 0;
  if (std::from_chars(text.data(), text.data() + text.size(), number).ec != std::errc()) {
    return refuse("it does not fit a 64-bit float");
  }
  value = number;
  return std::nullopt;
}

struct Unit {
  std::string_view name;
  int64_t bytes;
};
// Binary units first: bytes are printed in the largest of those that divides them.
constexpr std::array<Unit, 9> kUnits = {{{"TiB", int64_t{1} << 40},
                                         {"GiB", int64_t{1} << 30},
                                         {"MiB", int64_t{1} << 20},
                                         {"KiB", int64_t{1} << 10},
                                         {"TB", 1000000000000},
                                         {"GB", 1000000000},
                                         {"MB", 1000000},
                                         {"kB", 1000},
                                         {"B", 1}}};
constexpr size_t kNumBinaryUnits = 4;

// digits [. digits] times unit, exactly; nothing where that is no whole number or overflows.
std::optional<int64_t> scaled(std::string_view whole, std::string_view fraction, int64_t unit) {
  int64_t bytes = 0;
  if (std::from_chars(whole.data(), whole.data() + whole.size(), bytes).ec != std::errc() ||
      __builtin_mul_overflow(bytes, unit, &bytes)) {
    return std::nullopt;
  }
  if (fraction.empty()) return bytes;
  if (fraction.size() > 6) return std::nullopt;
  int64_t parts = 0, divisor = 1, extra = 0;
  std::from_chars(fraction.data(), fraction.data() + fraction.size(), parts);
  for (size_t i = 0; i < fraction.size(); ++i) divisor *= 10;
  if (__builtin_mul_overflow(parts, unit, &extra) || extra % divisor != 0 ||
      __builtin_add_overflow(bytes, extra / divisor, &bytes)) {
    return std::nullopt;
  }
  return bytes;
}

}  // namespace

std::optional<Refusal> Between::read(const YamlNode& node, int32_t& value) const {
  int64_t number = 0;
  if (auto refusal = read_integer(node, number)) return refusal;
  if (number < min || number > max) return refuse();
  value = static_cast<int32_t>(number);
  return std::nullopt;
}

std::string Between::allowed() const {
  return fmt::format("an integer from {} to {}", min, max);
}

std::optional<Refusal> Seed::read(const YamlNode& node, uint64_t& value) const {
  if (node.is_plain() && node.text.starts_with('-')) return refuse();
  return read_integer(node, value);
}

std::optional<Refusal> TopK::read(const YamlNode& node, int32_t& value) const {
  int32_t number = -1;
  if (node.kind != Kind::kNull) {
    if (auto refusal = read_integer(node, number)) return refusal;
    if (number < -1) return refuse();
  }
  value = number > 0 ? number : -1;
  return std::nullopt;
}

std::optional<Refusal> Real::read(const YamlNode& node, double& value) const {
  double number = 0;
  if (auto refusal = read_real(node, number)) return refusal;
  if (number > max || number < min || (number == min && !is_min_allowed)) return refuse();
  value = number;
  return std::nullopt;
}

std::string Real::allowed() const {
  return is_min_allowed ? fmt::format("a number from {} to {}", min, max)
                        : fmt::format("a number above {}, at most {}", min, max);
}

// With a point and a signed exponent even YAML 1.1 reads it as a number: 1e-05 would be text there.
std::string Real::yaml(double value) const {
  std::string text = fmt::format("{}", value);
  if (text.find('.') != std::string::npos) return text;
  return text.insert(std::min(text.find('e'), text.size()), ".0");
}

std::optional<Refusal> Temperature::read(const YamlNode& node, double& value) const {
  double number = 0;
  if (auto refusal = read_real(node, number)) return refusal;
  if (!is_temperature(static_cast<float>(number))) return refuse();
  value = number;
  return std::nullopt;
}

std::string Temperature::allowed() const {
  return std::string(kTemperatureAllowed);
}

std::optional<Refusal> Bytes::read(const YamlNode& node, int64_t& value) const {
  if (auto refusal = refuse_unless_plain(node)) return refusal;
  const std::string_view text = node.text;
  const size_t number_end = std::min(text.find_first_not_of("0123456789."), text.size());
  const std::string_view number = text.substr(0, number_end);
  const size_t point = std::min(number.find('.'), number.size());
  const std::string_view fraction = number.substr(std::min(point + 1, number.size()));
  const bool has_point = point < number.size();
  if (!all_digits(number.substr(0, point)) || (has_point && !all_digits(fraction))) return refuse();

  std::string_view name = text.substr(number_end);
  name.remove_prefix(std::min(name.find_first_not_of(' '), name.size()));
  if (name.empty()) name = "B";
  if (name == "KB") name = "kB";
  const auto unit = std::find_if(kUnits.begin(), kUnits.end(),
                                 [name](const Unit& known) { return known.name == name; });
  if (unit == kUnits.end()) {
    return refuse("units are KiB, MiB, GiB, TiB (powers of 1024) and kB, MB, GB, TB (of 1000)");
  }
  const std::optional<int64_t> bytes = scaled(number.substr(0, point), fraction, unit->bytes);
  if (!bytes) return refuse("it is no whole number of bytes below 2^63");
  if (*bytes < min || *bytes > max) return refuse();
  value = *bytes;
  return std::nullopt;
}

std::string Bytes::allowed() const {
  return fmt::format("bytes from {} to {}, as 64MiB, 2GiB or a plain number", yaml(min), yaml(max));
}

std::string Bytes::yaml(int64_t value) const {
  for (size_t i = 0; i < kNumBinaryUnits; ++i) {
    if (value > 0 && value % kUnits[i].bytes == 0) {
      return fmt::format("{}{}", value / kUnits[i].bytes, kUnits[i].name);
    }
  }
  return std::to_string(value);
}

std::optional<Refusal> Flag::read(const YamlNode& node, bool& value) const {
  if (auto refusal = refuse_unless_plain(node)) return refusal;
  if (node.text != "true" && node.text != "false") {
    const std::string word = lower(node.text);
    const bool is_true = word == "yes" || word == "on" || word == "y" || word == "true";
    const bool is_boolean = is_true || is_reserved_word(node.text);
    return refuse(is_boolean ? fmt::format("write {}", is_true ? "true" : "false") : "");
  }
  value = node.text == "true";
  return std::nullopt;
}

std::optional<Refusal> Text::read(const YamlNode& node, std::string& value) const {
  if (node.kind != Kind::kScalar || node.text.size() < min_bytes || node.text.size() > max_bytes) {
    return refuse();
  }
  const auto is_control = [](char c) { return static_cast<uint8_t>(c) < 0x20; };
  if (std::any_of(node.text.begin(), node.text.end(), is_control)) {
    return refuse("it holds a control character");
  }
  if (find_invalid_utf8(node.text)) {  // yaml-cpp makes one byte of "\\N"
    return refuse("an escape in it makes no UTF-8; write the character itself");
  }
  value = node.text;
  return std::nullopt;
}

std::string Text::allowed() const {
  return min_bytes == 0 ? fmt::format("text of at most {} bytes, \"\" for none", max_bytes)
                        : fmt::format("text of {} to {} bytes", min_bytes, max_bytes);
}

std::string Text::yaml(const std::string& value) const {
  constexpr std::string_view kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_/.-";
  const bool is_plain = !value.empty() && value.find_first_not_of(kPlain) == std::string::npos &&
                        (std::isalpha(static_cast<unsigned char>(value[0])) || value[0] == '/') &&
                        !is_reserved_word(value);
  return is_plain ? value : json(value);
}

std::string Text::json(const std::string& value) const {
  return Json(value).dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::optional<Refusal> OneOf::read(const YamlNode& node, std::string& value) const {
  if (node.kind != Kind::kScalar) return refuse();
  if (std::find(choices.begin(), choices.end(), node.text) == choices.end()) return refuse();
  value = node.text;
  return std::nullopt;
}

std::string OneOf::allowed() const {
  return fmt::format("one of {}", fmt::join(choices, ", "));
}

std::optional<Refusal> ComputeDType::read(const YamlNode& node, std::string& value) const {
  std::optional<Refusal> refusal = OneOf{{"bfloat16", "float32"}}.read(node, value);
  const std::string word = lower(node.text);
  const bool is_quantized =
      word.find("int8") != std::string::npos || word.find("int4") != std::string::npos ||
      word.find("fp8") != std::string::npos || word.find("float8") != std::string::npos ||
      word.find("fp4") != std::string::npos;
  if (refusal && is_quantized) {
    return Refusal{.code = ErrorCode::kUnsupported,
                   .advice = "a quantized policy has other log-probabilities than the trained one"};
  }
  return refusal;
}

std::string ComputeDType::allowed() const {
  return OneOf{{"bfloat16", "float32"}}.allowed();
}

std::optional<Refusal> SubsetOf::read(const YamlNode& node, std::vector<std::string>& value) const {
  if (node.kind != Kind::kSequence) return refuse("write [a, b], or [] for none");
  std::vector<std::string> words;
  for (const YamlNode& item : node.items) {
    std::string word;
    if (OneOf{choices}.read(item, word))
      return refuse(fmt::format("{} is none of them", item.shown()));
    if (std::find(words.begin(), words.end(), word) != words.end()) {
      return refuse(fmt::format("{} is listed twice", word));
    }
    words.push_back(std::move(word));
  }
  value = std::move(words);
  return std::nullopt;
}

std::string SubsetOf::allowed() const {
  return fmt::format("a list of some of {}", fmt::join(choices, ", "));
}

std::string SubsetOf::yaml(const std::vector<std::string>& value) const {
  return fmt::format("[{}]", fmt::join(value, ", "));
}

std::string SubsetOf::json(const std::vector<std::string>& value) const {
  return Json(value).dump();
}

std::optional<Refusal> TokenIds::read(const YamlNode& node, std::vector<int32_t>& value) const {
  if (node.kind != Kind::kSequence) return refuse("write [1, 2], or [] for none");
  if (node.items.size() > max_ids) return refuse(fmt::format("it lists {}", node.items.size()));
  std::vector<int32_t> ids;
  for (const YamlNode& item : node.items) {
    int32_t id = 0;
    const Between rule{0, std::numeric_limits<int32_t>::max()};
    if (auto refusal = rule.read(item, id)) {
      return refuse(fmt::format("entry {} is {}{}{}", ids.size(), item.shown(),
                                refusal->advice.empty() ? "" : ": ", refusal->advice));
    }
    ids.push_back(id);
  }
  value = std::move(ids);
  return std::nullopt;
}

std::string TokenIds::allowed() const {
  return fmt::format("a list of at most {} token ids, integers from 0 to 2147483647", max_ids);
}

std::string TokenIds::yaml(const std::vector<int32_t>& value) const {
  return fmt::format("[{}]", fmt::join(value, ", "));
}

}  // namespace rollpack::rollout
