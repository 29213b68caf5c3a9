#include "trainer_bridge/wire/utf8.h"

#include <cstdint>

namespace rollpack::bridge {
namespace {

bool is_continuation(uint8_t byte) {
  return (byte & 0xc0) == 0x80;
}

// Bytes of the well-formed character that starts `text`; 0: none does.
size_t character_bytes(std::string_view text) {
  const auto at = [&](size_t i) { return static_cast<uint8_t>(i < text.size() ? text[i] : 0); };
  const uint8_t lead = at(0), second = at(1);
  if (lead < 0x80) return 1;
  if (lead < 0xc2) return 0;
  if (lead < 0xe0) return is_continuation(second) ? 2 : 0;
  if (lead < 0xf0) {
    const bool overlong = lead == 0xe0 && second < 0xa0;
    const bool surrogate = lead == 0xed && second > 0x9f;
    return is_continuation(second) && is_continuation(at(2)) && !overlong && !surrogate ? 3 : 0;
  }
  const bool overlong = lead == 0xf0 && second < 0x90;
  const bool too_high = lead > 0xf4 || (lead == 0xf4 && second > 0x8f);
  const bool tail = is_continuation(second) && is_continuation(at(2)) && is_continuation(at(3));
  return tail && !overlong && !too_high ? 4 : 0;
}

}  // namespace

bool is_utf8(std::string_view text) {
  while (!text.empty()) {
    const size_t bytes = character_bytes(text);
    if (bytes == 0) return false;
    text.remove_prefix(bytes);
  }
  return true;
}

std::string shortened(std::string_view text, size_t max_bytes) {
  if (text.size() <= max_bytes) return std::string(text);
  size_t end = max_bytes;
  while (end > 0 && is_continuation(static_cast<uint8_t>(text[end]))) --end;
  return std::string(text.substr(0, end)) + "...";
}

}  // namespace rollpack::bridge
