// What every target does with its input: read it, or refuse it by an error that is no `internal`.
// Anything else (another exception, a sanitizer's report, abort) is a finding.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>

#include "kernels/base/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace rollpack::fuzz {

[[noreturn]] inline void finding(const std::string& what) {
  std::fprintf(stderr, "finding: %s\n", what.c_str());
  std::abort();
}

inline void require(bool holds, const char* what) {
  if (!holds) finding(what);
}

// Whether `read` went through.
template <class Read>
bool reads_or_refuses(Read&& read) {
  try {
    read();
    return true;
  } catch (const Error& error) {
    if (error.info.code == ErrorCode::kInternal) finding(error.what());
    return false;
  }
}

inline std::span<const uint8_t> bytes_of(const uint8_t* data, size_t size) {
  return {data, size};
}

inline std::string_view text_of(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

}  // namespace rollpack::fuzz
