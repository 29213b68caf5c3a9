// What a call throws, as text and as code, for tests that compare whole error messages.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "kernels/base/error.h"

namespace rollpack::testing {

// "code: text" of the rollpack::Error that `call` throws; "no error" where it throws none.
inline std::string error_text(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return std::string(error_code_name(error.info.code)) + ": " + error.what();
  }
  return "no error";
}

// The same as it is thrown; "no error" is its message where none is.
inline ErrorInfo error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.info;
  }
  return {.message = "no error"};
}

// Replaces every `from` in `text`, so that temporary paths can stand as "DIR" in expectations.
inline std::string with_replaced(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
  return text;
}

}  // namespace rollpack::testing
