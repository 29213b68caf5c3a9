// The one exception type that crosses rollpack's layers. It names the field, its value, where the
// value came from and what is allowed, so that every surface (stderr, JSONL, the bridge) can say
// the same thing. Broken invariants are errors of code `internal`.
#pragma once

#include <exception>
#include <string>
#include <string_view>

namespace rollpack {

enum class ErrorCode {
  kInvalidArgument,    // the caller's value is wrong
  kUnsupported,        // right in itself, but not built or not possible here
  kNotFound,           // a file, tensor, request or slot that does not exist
  kFailedPrecondition, // the right call in the wrong state
  kResourceExhausted,  // memory, pages, descriptors: names what would be needed
  kWouldBlock,         // queues are full: try again after taking results
  kDeadlineExceeded,   // a wait ran out of time
  kDataLoss,           // a checksum, seal or size does not hold
  kUnavailable,        // a peer is gone or shutting down
  kNonFinite,          // a NaN or infinity where numbers are promised
  kInternal,           // an invariant of ours is broken
};

// The code as it stands in JSON and MessagePack, e.g. "invalid_argument".
std::string_view error_code_name(ErrorCode code);
// Inverse of error_code_name; kInternal for a name it does not know.
ErrorCode error_code_from_name(std::string_view name);

struct ErrorInfo {
  ErrorCode code = ErrorCode::kInternal;
  std::string field;    // e.g. "engine.max_num_seqs"
  std::string value;    // as the user wrote it
  std::string origin;   // e.g. "configs/quickstart.yaml:12"
  std::string allowed;  // e.g. "an integer from 1 to 65536"
  std::string message;  // what happened or what to do, one sentence
};

class Error : public std::exception {
 public:
  explicit Error(ErrorInfo info);
  const char* what() const noexcept override { return text_.c_str(); }

  const ErrorInfo info;

 private:
  std::string text_;
};

// One line: "{field} = {value} ({origin}): expected {allowed}; {message}", empty parts left out.
std::string format_error(const ErrorInfo& info);

// Throws Error(kInternal) naming `what`; for invariants that only a bug of ours can break.
[[noreturn]] void fail_invariant(std::string_view what);

}  // namespace rollpack
