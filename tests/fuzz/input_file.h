// An input as a regular file that exists in memory alone.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "tests/fuzz/fuzz_input.h"

namespace rollpack::fuzz {

class InputFile {
 public:
  InputFile(const uint8_t* data, size_t size) : fd_(::memfd_create("fuzz-input", MFD_CLOEXEC)) {
    require(fd_ >= 0, "memfd_create failed");
    size_t written = 0;
    while (written < size) {
      const ssize_t put = ::write(fd_, data + written, size - written);
      require(put > 0, "writing the input failed");
      written += static_cast<size_t>(put);
    }
  }
  ~InputFile() { ::close(fd_); }
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

}  // namespace rollpack::fuzz
