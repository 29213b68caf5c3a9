#include "trainer_bridge/wire/message_scan.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>
#include <vector>

#include "kernels/base/error.h"
#include "trainer_bridge/wire/utf8.h"

namespace rollpack::bridge {
namespace {

enum class Kind : uint8_t { kScalar, kText, kBinary, kArray, kMap };

// One value's tag: its kind, and the payload's bytes or the container's entries.
struct Tag {
  Kind kind = Kind::kScalar;
  uint64_t count = 0;
};

struct Container {
  bool is_map = false;
  uint64_t values_left = 0;  // a map's keys count too
  std::vector<std::string_view> keys;
};

class Scanner {
 public:
  explicit Scanner(std::span<const uint8_t> bytes) : bytes_(bytes) {}

  void scan() {
    if (open(next_tag()) != Kind::kMap) refuse(0, "a message that is no map", "one map");
    while (!open_.empty()) {
      if (open_.back().values_left == 0) {
        close();
        continue;
      }
      scan_value();
    }
    if (position_ != bytes_.size()) {
      refuse(position_, fmt::format("{} trailing bytes", bytes_.size() - position_),
             "nothing behind the map");
    }
  }

 private:
  [[noreturn]] void refuse(size_t position, std::string value, std::string allowed) const {
    throw Error({.code = ErrorCode::kInvalidArgument,
                 .field = "message",
                 .value = std::move(value),
                 .origin = fmt::format("byte {}", position),
                 .allowed = std::move(allowed)});
  }

  std::span<const uint8_t> take(uint64_t count) {
    if (count > bytes_.size() - position_) {
      refuse(position_, fmt::format("a length of {} bytes", count),
             fmt::format("at most the {} bytes left in the frame", bytes_.size() - position_));
    }
    const auto part = bytes_.subspan(position_, count);
    position_ += count;
    return part;
  }

  uint64_t take_length(int num_bytes) {
    uint64_t value = 0;
    for (const uint8_t byte : take(static_cast<uint64_t>(num_bytes))) value = value << 8 | byte;
    return value;
  }

  Tag next_tag() {
    const size_t at = position_;
    const uint8_t tag = take(1)[0];
    if (tag <= 0x7f || tag >= 0xe0) return {};
    if (tag <= 0x8f) return {Kind::kMap, tag & 0x0fu};
    if (tag <= 0x9f) return {Kind::kArray, tag & 0x0fu};
    if (tag <= 0xbf) return {Kind::kText, tag & 0x1fu};
    switch (tag) {
      case 0xc0:
      case 0xc2:
      case 0xc3:
        return {};
      case 0xc4:
      case 0xc5:
      case 0xc6:
        return {Kind::kBinary, take_length(1 << (tag - 0xc4))};
      case 0xca:
        take(4);
        return {};
      case 0xcb:
        take(8);
        return {};
      case 0xcc:
      case 0xcd:
      case 0xce:
      case 0xcf:
        take(1u << (tag - 0xcc));
        return {};
      case 0xd0:
      case 0xd1:
      case 0xd2:
      case 0xd3:
        take(1u << (tag - 0xd0));
        return {};
      case 0xd9:
      case 0xda:
      case 0xdb:
        return {Kind::kText, take_length(1 << (tag - 0xd9))};
      case 0xdc:
      case 0xdd:
        return {Kind::kArray, take_length(2 << (tag - 0xdc))};
      case 0xde:
      case 0xdf:
        return {Kind::kMap, take_length(2 << (tag - 0xde))};
      default:
        refuse(at, fmt::format("tag 0x{:02x}", tag), "no extension types");
    }
  }

  std::string_view take_text(uint64_t count) {
    const size_t at = position_;
    const auto part = take(count);
    const std::string_view text(reinterpret_cast<const char*>(part.data()), part.size());
    if (!is_utf8(text)) refuse(at, "text that is not UTF-8", "UTF-8 text, or bin for raw bytes");
    return text;
  }

  // Consumes a scalar's or text's payload, or enters the container.
  Kind open(Tag tag) {
    if (++num_values_ > kMaxMessageValues) {
      refuse(position_, fmt::format("more than {} values", kMaxMessageValues),
             "fewer values: token ids and floats travel as bin");
    }
    if (tag.kind == Kind::kText) take_text(tag.count);
    if (tag.kind == Kind::kBinary) take(tag.count);
    if (tag.kind != Kind::kArray && tag.kind != Kind::kMap) return tag.kind;
    if (open_.size() == kMaxMessageDepth) {
      refuse(position_, fmt::format("nesting deeper than {}", kMaxMessageDepth),
             fmt::format("at most {} maps and arrays inside one another", kMaxMessageDepth));
    }
    const uint64_t values = tag.kind == Kind::kMap ? 2 * tag.count : tag.count;
    if (values > bytes_.size() - position_) {  // a value is a byte or more
      refuse(position_, fmt::format("a container of {} entries", tag.count),
             fmt::format("at most what {} bytes can hold", bytes_.size() - position_));
    }
    open_.push_back({tag.kind == Kind::kMap, values, {}});
    return tag.kind;
  }

  void scan_value() {
    Container& container = open_.back();
    const bool is_key = container.is_map && container.values_left % 2 == 0;
    --container.values_left;
    const size_t at = position_;
    const Tag tag = next_tag();
    if (!is_key) {
      open(tag);  // may move `container`
      return;
    }
    if (tag.kind != Kind::kText) refuse(at, "a key that is no text", "text as keys");
    container.keys.push_back(take_text(tag.count));
  }

  void close() {
    std::vector<std::string_view>& keys = open_.back().keys;
    std::sort(keys.begin(), keys.end());
    const auto twin = std::adjacent_find(keys.begin(), keys.end());
    if (twin != keys.end()) {
      refuse(position_, fmt::format("key \"{}\" twice in one map", twin->substr(0, 80)),
             "each key once");
    }
    open_.pop_back();
  }

  std::span<const uint8_t> bytes_;
  size_t position_ = 0;
  size_t num_values_ = 0;
  std::vector<Container> open_;
};

}  // namespace

void scan_message(std::span<const uint8_t> bytes) {
  Scanner(bytes).scan();
}

}  // namespace rollpack::bridge
