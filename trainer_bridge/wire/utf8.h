// UTF-8 as text fields must be: it is hashed into random streams and echoed in errors.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace rollpack::bridge {

// Whether `text` is well-formed: no overlong forms, surrogates or values above U+10FFFF.
// Source: Unicode 15, table 3-7.
bool is_utf8(std::string_view text);

// `text`, or its beginning and "...", cut between characters, for messages that quote what a peer
// sent.
std::string shortened(std::string_view text, size_t max_bytes = 80);

}  // namespace rollpack::bridge
