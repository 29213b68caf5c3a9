// One .safetensors file: u64 header size (little-endian), a JSON header
// {name: {dtype, shape, data_offsets}}, the tensors' bytes without holes.
// Source: the format's description at github.com/huggingface/safetensors; every rule of it is
// checked before a byte of data is trusted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "rollout/jsonl/file_descriptor.h"
#include "rollout/model/checkpoint.h"

namespace rollpack::rollout {

class SafetensorsFile {
 public:
  // Opens and checks the header.
  // Errors: not_found; invalid_argument for a header that breaks the format; data_loss where header
  // and file size disagree. All name the file, and the tensor where there is one.
  explicit SafetensorsFile(const std::string& path);

  // Ordered by offset.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  const std::string& path() const { return path_; }
  // Errors: unsupported where tensor `index` is no float of 16 or 32 bits.
  void require_readable(size_t index) const;
  // Reads bytes [offset, offset + out.size()) of tensor `index`, which has them. Callable from
  // several threads at once.
  // Errors: those of require_readable(); data_loss where the file got shorter since it was opened.
  void read(size_t index, int64_t offset, std::span<std::byte> out) const;

 private:
  std::string path_;
  FileDescriptor fd_;
  std::vector<TensorInfo> tensors_;
  std::vector<int64_t> offsets_;  // beside tensors_, from the start of the file
};

}  // namespace rollpack::rollout
