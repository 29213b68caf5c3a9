// Numbers and plain structs as their bytes, between two processes of one program on one host.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/base/error.h"

namespace rollpack::rollout {

class PlainWriter {
 public:
  explicit PlainWriter(std::vector<uint8_t>& out) : out_(out) {}

  template <class T>
  requires std::is_trivially_copyable_v<T>
  void value(const T& value) { bytes(&value, sizeof value); }
  template <class T>
  requires std::is_trivially_copyable_v<T>
  void list(const std::vector<T>& values) {
    value(static_cast<uint64_t>(values.size()));
    bytes(values.data(), values.size() * sizeof(T));
  }
  void bytes(const void* data, size_t size) {
    const auto* first = static_cast<const uint8_t*>(data);
    out_.insert(out_.end(), first, first + size);
  }

 private:
  std::vector<uint8_t>& out_;
};

// Errors: data_loss naming `what` where there are fewer bytes than asked for, or some are left.
class PlainReader {
 public:
  PlainReader(std::span<const uint8_t> bytes, const char* what) : left_(bytes), what_(what) {}

  template <class T>
  requires std::is_trivially_copyable_v<T> T value() {
    T value;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }
  template <class T>
  requires std::is_trivially_copyable_v<T> std::vector<T> list() {
    const auto count = value<uint64_t>();
    if (count > left_.size() / sizeof(T)) fail();
    std::vector<T> values(count);
    const std::span<const uint8_t> bytes = take(count * sizeof(T));
    if (count > 0) std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
  std::span<const uint8_t> rest() { return take(left_.size()); }
  void finish() const {
    if (!left_.empty()) fail();
  }

 private:
  std::span<const uint8_t> take(size_t size) {
    if (size > left_.size()) fail();
    const std::span<const uint8_t> bytes = left_.first(size);
    left_ = left_.subspan(size);
    return bytes;
  }
  [[noreturn]] void fail() const {
    throw Error({.code = ErrorCode::kDataLoss,
                 .field = what_,
                 .message = "the bytes are not those of a whole one"});
  }

  std::span<const uint8_t> left_;
  const char* const what_;
};

}  // namespace rollpack::rollout
