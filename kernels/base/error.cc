#include "kernels/base/error.h"

#include <array>
#include <utility>

namespace rollpack {
namespace {

constexpr std::array<std::string_view, 11> kNames = {
    "invalid_argument",  "unsupported", "not_found",   "failed_precondition",
    "resource_exhausted", "would_block", "deadline_exceeded", "data_loss",
    "unavailable",       "non_finite",  "internal"};

}  // namespace

std::string_view error_code_name(ErrorCode code) { return kNames[static_cast<size_t>(code)]; }

ErrorCode error_code_from_name(std::string_view name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) return static_cast<ErrorCode>(i);
  }
  return ErrorCode::kInternal;
}

std::string format_error(const ErrorInfo& info) {
  std::string text = info.field;
  if (!info.value.empty()) text += (text.empty() ? "" : " = ") + info.value;
  if (!info.origin.empty()) text += text.empty() ? info.origin : " (" + info.origin + ")";
  if (!info.allowed.empty()) text += (text.empty() ? "expected " : ": expected ") + info.allowed;
  if (!info.message.empty()) {
    text += (text.empty() ? "" : info.allowed.empty() ? ": " : "; ") + info.message;
  }
  return text;
}

Error::Error(ErrorInfo error_info) : info(std::move(error_info)), text_(format_error(info)) {}

void fail_invariant(std::string_view what) {
  throw Error({.code = ErrorCode::kInternal, .message = std::string(what)});
}

}  // namespace rollpack
