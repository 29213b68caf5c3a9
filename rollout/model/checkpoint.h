// The weight files of a Hugging Face folder: one model.safetensors, or shards listed in
// model.safetensors.index.json. Headers are checked at opening; tensors are read piece by piece
// (pread into memory of the caller), so that a file truncated meanwhile is an error, not a SIGBUS.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/base/dtype.h"

namespace rollpack::rollout {

// Why no int8, int4, fp8, GPTQ or AWQ weights are read: what an error says.
inline constexpr char kNoQuantizedWeights[] =
    "quantized weights are another policy than the one that is trained, with other "
    "log-probabilities; dequantize them to bfloat16 first";

struct TensorInfo {
  std::string name;
  DType dtype = DType::kF32;  // kF32, kF16 or kBF16 where is_readable
  std::string file_dtype;     // as the file says it: "BF16", "F8_E4M3", ...
  bool is_readable = true;    // false: read() refuses this dtype by name
  std::vector<int64_t> shape;
  int64_t bytes = 0;
};

class Checkpoint {
 public:
  virtual ~Checkpoint() = default;

  // All tensors, ordered by file and offset (the order that reads sequentially).
  virtual const std::vector<TensorInfo>& tensors() const = 0;
  // Errors: unsupported where tensor `index` is not readable, naming tensor and file.
  virtual void require_readable(size_t index) const = 0;
  // Reads bytes [offset, offset + out.size()) of tensor `index`. Callable from several threads.
  // Errors: those of require_readable(); data_loss, naming tensor and file.
  virtual void read(size_t index, int64_t offset, std::span<std::byte> out) const = 0;
};

// Errors: not_found, or invalid_argument / data_loss naming file, tensor and what is wrong: header
// size, duplicate keys, offsets out of range, overlaps, holes, shape x dtype against bytes, an
// index that names a missing file or a path outside the folder, or disagrees with its shards.
std::unique_ptr<Checkpoint> open_checkpoint(const std::string& folder);

// For telling checkpoints apart at start-up, at the cost of a few KiB a tensor: of names, dtypes,
// shapes and the first and last 2 KiB of each tensor. Errors: as Checkpoint::read().
uint32_t checkpoint_digest(const Checkpoint& checkpoint);

}  // namespace rollpack::rollout
